"""Model cards and the README's table of all checkpoints, generated from the records.

Everything in a card follows from its record, except the text between two markers, which is written by hand and kept.
A card says nothing that is not in the record, the packaged data or a source that it names; what is not known is shown
as unknown.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from huggingface_hub import EvalResult, ModelCardData

from wn21k_zoo.cards.sections import SECTIONS, in_millions, library_of, parameter_count, summary
from wn21k_zoo.checkpoints import CHECKPOINTS, PAPER, Checkpoint, HubSource, Metric, Source, URLSource
from wn21k_zoo.errors import InvalidArgumentError, RecordError
from wn21k_zoo.markdown import markdown_table

__all__ = [
    "FOLDER",
    "card_data",
    "find_checkout",
    "known_prose",
    "parameter_count",
    "planned_files",
    "prose_of",
    "render_card",
    "stale_cards",
    "with_zoo_table",
    "zoo_table",
]

FOLDER = "model_cards"
PROSE = ("<!-- prose -->", "<!-- end of prose -->")
TABLE = ("<!-- zoo table -->", "<!-- end of zoo table -->")
# By label space. timm/imagenet-w21-p is the winter 2021 release; no ready-made copy of fall 2011's 21K-P is known, so
# that one has a plain name, which the Hub does not link.
_DATASETS: Mapping[str, str] = MappingProxyType(
    {
        "imagenet1k": "ILSVRC/imagenet-1k",
        "imagenet12k": "timm/imagenet-12k-wds",
        "imagenet21k_p_fall11": "imagenet-21k-p-fall11",
        "imagenet21k_p_winter21": "timm/imagenet-w21-p",
    }
)
_DATASETS_BY_TITLE: Mapping[str, str] = MappingProxyType(
    {
        "ImageNet-1K": _DATASETS["imagenet1k"],
        "ImageNet-21K-P fall11": _DATASETS["imagenet21k_p_fall11"],
        "ImageNet-21K-P winter21": _DATASETS["imagenet21k_p_winter21"],
    }
)


def render_card(checkpoint: Checkpoint, prose: str = "") -> str:
    """The model card of a record: YAML front matter and Markdown.

    Args:
        checkpoint: The record.
        prose: Markdown to put between the markers, as :func:`prose_of` reads it.
    """
    sections = (
        summary(checkpoint),
        "\n".join(part for part in (PROSE[0], prose.strip(), PROSE[1]) if part),
        *(f"## {title}\n\n{section(checkpoint)}" for title, section in SECTIONS.items()),
    )
    header = card_data(checkpoint).to_yaml()
    return f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n"


def card_data(checkpoint: Checkpoint) -> ModelCardData:
    """The front matter of a record's card.

    Whether a figure is verified is left out: only the Hub sets that field.
    """
    library = library_of(checkpoint.architecture)
    tags = ["image-classification", library, "wordnet"]
    datasets: list[str] = []
    if checkpoint.paper == PAPER:  # otherwise it is unknown on what it was trained
        tags += ["imagenet-21k", "imagenet-21k-p"]
        spaces = dict.fromkeys((checkpoint.label_space, "imagenet21k_p_fall11"))
        datasets = [_DATASETS[space] for space in spaces]
    return ModelCardData(
        license=checkpoint.license,
        library_name=library,
        pipeline_tag="image-classification",
        tags=[*tags, checkpoint.label_space.replace("_", "-"), checkpoint.head.replace("_", "-")],
        datasets=datasets or None,
        model_name=checkpoint.name,
        eval_results=[_eval_result(metric, checkpoint.metrics) for metric in checkpoint.metrics] or None,
    )


def prose_of(text: str, where: str = "The card") -> str:
    """The hand-written part of a card.

    Raises:
        RecordError: The markers are not there once each, in order, so the hand-written part would be lost.
    """
    return _between(text, PROSE, where)[1].strip()


def zoo_table(checkpoints: Iterable[Checkpoint] = CHECKPOINTS) -> str:
    """A Markdown table of records, with links to their cards."""
    rows = []
    for checkpoint in checkpoints:
        kinds = Counter(_kind(source) for source in checkpoint.sources)
        rows.append(
            (
                f"[`{checkpoint.name}`]({FOLDER}/{checkpoint.name}.md)",
                f"`{checkpoint.label_space}`",
                in_millions(parameter_count(checkpoint)),
                "; ".join(f"{metric.value} {metric.name}" for metric in checkpoint.metrics) or None,
                ", ".join(f"{kind} x {count}" if count > 1 else kind for kind, count in kinds.items()) or None,
                checkpoint.license,
            )
        )
    header = ("name", "label space", "parameters", "published figure", "sources", "licence of the weights")
    return markdown_table(header, rows)


def with_zoo_table(readme: str, checkpoints: Iterable[Checkpoint] = CHECKPOINTS) -> str:
    """The text of a README with its table regenerated.

    Raises:
        RecordError: It has no place for the table.
    """
    before, _, after = _between(readme, TABLE, "README.md")
    return f"{before}{TABLE[0]}\n{zoo_table(checkpoints)}\n{TABLE[1]}{after}"


def known_prose(name: str, *folders: Path | None) -> str:
    """The hand-written part of a record's card, from the first folder that has the card; '' if none has it.

    Args:
        name: The record.
        *folders: Folders of cards, in order of preference; None is skipped.

    Raises:
        RecordError: That card has lost its markers.
    """
    paths = [folder / f"{name}.md" for folder in folders if folder is not None]
    found = next((path for path in paths if path.is_file()), None)
    return prose_of(found.read_text(encoding="utf-8"), str(found)) if found else ""


def find_checkout() -> Path | None:
    """The checkout that this package is imported from; None if it is installed."""
    folder = Path(__file__).resolve().parents[2]
    project = folder / "pyproject.toml"
    return folder if project.is_file() and 'name = "wn21k-zoo"' in project.read_text(encoding="utf-8") else None


def planned_files(
    checkout: Path | None, output: Path | None = None, checkpoints: Iterable[Checkpoint] = CHECKPOINTS
) -> dict[Path, str]:
    """All cards, and the README unless ``output`` is given, with the text that they should have.

    Args:
        checkout: Has the hand-written prose and the README.
        output: Folder of the cards; by default the checkout's.
        checkpoints: The records.

    Raises:
        InvalidArgumentError: Neither is given.
        RecordError: An existing file has lost its markers.
    """
    own = checkout / FOLDER if checkout else None
    folder = output or own
    if folder is None:
        raise InvalidArgumentError(
            "This package is installed, not a checkout, so there is no README to write; name a folder with --output."
        )
    checkpoints = tuple(checkpoints)
    files = {folder / f"{one.name}.md": render_card(one, known_prose(one.name, output, own)) for one in checkpoints}
    if output is None and checkout is not None:
        readme = checkout / "README.md"
        files[readme] = with_zoo_table(readme.read_text(encoding="utf-8"), checkpoints)
    return files


def stale_cards(folder: Path, planned: Iterable[Path]) -> list[Path]:
    """Cards in a folder that belong to no record; they hold prose, so only a person may delete them."""
    return sorted(
        path
        for path in set(folder.glob("*.md")) - set(planned)
        if PROSE[0] in path.read_text(encoding="utf-8", errors="replace")
    )


def _between(text: str, markers: tuple[str, str], where: str) -> tuple[str, str, str]:
    start, end = (text.find(marker) for marker in markers)
    if not 0 <= start < end or any(text.count(marker) != 1 for marker in markers):
        raise RecordError(f"{where} needs {markers[0]} and {markers[1]}, once each and in this order; put them back.")
    return text[:start], text[start + len(markers[0]) : end], text[end + len(markers[1]) :]


def _eval_result(metric: Metric, metrics: Sequence[Metric]) -> EvalResult:
    title, _, split = metric.dataset.partition(", ")
    # The Hub's format has one source for all figures on a data set; if theirs differ, it would be wrong for some.
    one_source = len({other.measured_by for other in metrics if other.dataset == metric.dataset}) == 1
    url = metric.measured_by if one_source and metric.measured_by.startswith("https://") else None
    return EvalResult(
        task_type="image-classification",
        dataset_type=_DATASETS_BY_TITLE.get(title) or _slug(title),
        dataset_name=title,
        dataset_split=split or None,
        metric_type="accuracy" if metric.name == "top-1" else _slug(metric.name),  # the Hub's name of it
        metric_value=metric.value,
        metric_name=metric.name,
        metric_args={"protocol": metric.protocol, "measured_by": metric.measured_by},
        source_name="ImageNet-21K Pretraining for the Masses" if url == PAPER else None,
        source_url=url,
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _kind(source: Source) -> str:
    return "Hub" if isinstance(source, HubSource) else "web" if isinstance(source, URLSource) else "Python package"
