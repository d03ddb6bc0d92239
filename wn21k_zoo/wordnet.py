"""Compile the data in ``wn21k_zoo/_data`` from NLTK's WordNet 3.0 and timm's class lists; not needed at run time.

``wn21k tree build`` writes the same bytes wherever it runs. WordNet gives 1,422 of its noun synsets several hypernyms;
which one counts for ImageNet does not follow from WordNet and is listed in ``primary_parents.tsv`` (the hypernym that
comes last in ImageNet's ``wordnet.is_a.txt``).
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from importlib import resources
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from wn21k_zoo.errors import TreeError
from wn21k_zoo.labels import LABEL_SPACES

__all__ = ["compile_data", "packaged_data"]

NOUN_SYNSETS = 82_115

TIMM_FILES: Mapping[str, str] = MappingProxyType(
    {
        "imagenet1k": "imagenet_synsets.txt",
        "imagenet12k": "imagenet12k_synsets.txt",
        "imagenet21k_goog": "imagenet21k_goog_synsets.txt",
        "imagenet22k": "imagenet22k_synsets.txt",
        "imagenet22k_ms": "imagenet22k_ms_synsets.txt",
        "imagenet21k_p_fall11": "imagenet21k_miil_synsets.txt",
        "imagenet21k_p_winter21": "imagenet21k_miil_w21_synsets.txt",
    }
)

# The lexicographer files by number, as lexnames(5WN) lists them: NLTK needs a file of them, Debian has none.
_NOUNS = (
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time"
)
_VERBS = (
    "body change cognition communication competition consumption contact creation emotion motion perception possession "
    "social stative weather"
)
LEXNAMES = (
    *("adj.all", "adj.pert", "adv.all"),
    *(f"noun.{topic}" for topic in _NOUNS.split(" ")),
    *(f"verb.{topic}" for topic in _VERBS.split(" ")),
    "adj.ppl",
)


def compile_data(wordnet: Path | None = None) -> dict[str, bytes]:
    """Compile the data files from WordNet; return them by their path relative to ``_data``.

    Args:
        wordnet: A folder with WordNet 3.0's database files (``data.noun`` and the rest, such as Debian's
            ``/usr/share/wordnet``), or one laid out as NLTK data (``corpora/wordnet``). By default NLTK's own copy.

    Raises:
        TreeError: There is no WordNet 3.0 at that place.
    """
    with _nltk_wordnet(wordnet) as reader:
        files = _noun_files(reader)
    for name in LABEL_SPACES:
        source = resources.files("timm.data") / "_info" / TIMM_FILES[name]
        files[f"label_spaces/{name}.txt"] = source.read_bytes().replace(b"\r\n", b"\n")
    return files


def packaged_data(path: str) -> bytes | None:
    """The shipped file at ``path`` (relative to ``_data``), or None when there is none."""
    file = resources.files("wn21k_zoo") / "_data" / path
    return file.read_bytes() if file.is_file() else None


def _noun_files(reader: Any) -> dict[str, bytes]:
    synsets = sorted(reader.all_synsets("n"), key=lambda synset: synset.offset())
    if reader.get_version() != "3.0" or len(synsets) != NOUN_SYNSETS:
        raise TreeError(
            f"This is WordNet {reader.get_version()} with {len(synsets):,} noun synsets; "
            f"WordNet 3.0 with {NOUN_SYNSETS:,} is needed, because wnids are its offsets."
        )
    chosen = _primary_parents()
    position = {synset.offset(): index for index, synset in enumerate(synsets)}
    parents = np.full(len(synsets), -1, dtype="<i4")
    for index, synset in enumerate(synsets):
        hypernyms = {hypernym.offset() for hypernym in synset.hypernyms()}
        if len(hypernyms) > 1:
            hypernyms &= {chosen.get(synset.offset())}
            if not hypernyms:
                raise TreeError(f"primary_parents.tsv names none of the hypernyms of {synset.name()}.")
        if hypernyms:
            parents[index] = position[hypernyms.pop()]
    buffer = BytesIO()
    np.save(buffer, np.stack([np.array([synset.offset() for synset in synsets], dtype="<i4"), parents]))
    lemmas = [", ".join(lemma.replace("_", " ") for lemma in synset.lemma_names()) for synset in synsets]
    definitions = [_clean(synset.definition()) for synset in synsets]
    return {
        "nouns.npy": buffer.getvalue(),
        "lemmas.txt": "".join(f"{text}\n" for text in lemmas).encode(),
        "definitions.txt": "".join(f"{text}\n" for text in definitions).encode(),
    }


def _clean(definition: str) -> str:
    """Remove what NLTK leaves of the examples it cuts out: their punctuation and their sources ('; --Genesis')."""
    parts = (part.strip() for part in definition.split("; "))
    kept = (part for part in parts if not part.startswith("-") and any(map(str.isalnum, part)))
    return "; ".join(kept).rstrip(" ;:,")


def _primary_parents() -> dict[int, int]:
    text = (resources.files("wn21k_zoo") / "_data" / "primary_parents.tsv").read_text(encoding="ascii")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return {int(child[1:]): int(parent[1:]) for child, parent in rows}


@contextlib.contextmanager
def _nltk_wordnet(folder: Path | None) -> Iterator[Any]:
    import nltk
    from nltk.corpus.reader.wordnet import WordNetCorpusReader

    with contextlib.ExitStack() as stack:
        if folder is not None:
            database = folder / "corpora" / "wordnet" if (folder / "corpora" / "wordnet").is_dir() else folder
            if not (database / "data.noun").is_file():
                raise TreeError(f"{folder} has no data.noun; name a folder with WordNet 3.0's database files.")
            # NLTK refuses links and folders outside its search path, so it gets its own copy.
            data = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
            copy = data / "corpora" / "wordnet"
            shutil.copytree(database, copy)
            if not (copy / "lexnames").exists():
                categories = {"noun": 1, "verb": 2, "adj": 3, "adv": 4}
                lines = (f"{i:02d}\t{name}\t{categories[name.split('.')[0]]}\n" for i, name in enumerate(LEXNAMES))
                (copy / "lexnames").write_text("".join(lines), encoding="ascii")
            nltk.data.path.insert(0, str(data))
            stack.callback(nltk.data.path.remove, str(data))
        try:
            root = nltk.data.find("corpora/wordnet")
            with warnings.catch_warnings(action="ignore", category=UserWarning):  # that other languages are missing
                reader = WordNetCorpusReader(root, omw_reader=None)
            yield reader
        except (LookupError, OSError) as error:
            raise TreeError(
                "NLTK's WordNet cannot be read: run python -m nltk.downloader wordnet, or name a folder with "
                f"WordNet 3.0's database files by --wordnet ({type(error).__name__})."
            ) from error
