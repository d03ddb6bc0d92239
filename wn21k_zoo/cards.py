"""Model cards and the README's table of all checkpoints, written from the records.

Everything in a card follows from its record, except what stands between two markers: that is written by hand and kept.
A card says nothing that the record, the packaged data or a source that it names does not say; what is not known is
shown as unknown.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from wn21k_zoo import convert
from wn21k_zoo.architectures import ARCHITECTURES
from wn21k_zoo.checkpoints import CHECKPOINTS, Checkpoint, HubSource, Metric, PackageSource, Source, URLSource
from wn21k_zoo.errors import InvalidArgumentError, RecordError
from wn21k_zoo.labels import LABEL_SPACES, LabelSpace
from wn21k_zoo.registry import TIMM_PREFIX
from wn21k_zoo.synsets import load_nouns
from wn21k_zoo.tree import SemanticTree

__all__ = [
    "card_data",
    "find_checkout",
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
UNKNOWN = "unknown"

PAPER = "https://arxiv.org/abs/2104.10972"
ISSUES = "https://github.com/Alibaba-MIIL/ImageNet21K/issues"
PERSON = "n00007846"

# By label space. timm/imagenet-w21-p is the winter 2021 release; of fall 2011's 21K-P no ready-made copy is known here,
# so that one has a plain name, which the Hub links to nothing.
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
_METRIC_TYPES: Mapping[str, str] = MappingProxyType({"top-1": "accuracy"})  # the Hub's name of it
_HEADS: Mapping[str, str] = MappingProxyType(
    {"semantic_softmax": "semantic softmax", "softmax": "softmax", "sigmoid": "sigmoid"}
)
_RESIZES: Mapping[str, str] = MappingProxyType(
    {
        "squash": "squash to the input size, whatever the aspect; nothing is cropped",
        "crop": "shorter side to size / crop_pct, then the centre is cropped",
        "border": "padded to a square, then resized",
    }
)


def render_card(checkpoint: Checkpoint, prose: str = "") -> str:
    """The model card of a record: YAML front matter and Markdown.

    Args:
        checkpoint: The record.
        prose: Markdown to stand between the markers, as :func:`prose_of` reads it.
    """
    sections = (
        _summary(checkpoint),
        "\n".join(part for part in (PROSE[0], prose.strip(), PROSE[1]) if part),
        *(f"## {title}\n\n{_SECTIONS[title](checkpoint)}" for title in _SECTIONS),
    )
    header = card_data(checkpoint).to_yaml()
    return ModelCard(f"---\n{header}\n---\n\n" + "\n\n".join(sections) + "\n").content


def card_data(checkpoint: Checkpoint) -> ModelCardData:
    """The front matter of a record's card.

    Whether a figure is verified is left out: that field is the Hub's own.
    """
    pretrained_on = [_DATASETS["imagenet21k_p_fall11"]] if checkpoint.paper == PAPER else []
    tags = ["image-classification", "timm", "wordnet", *(["imagenet-21k", "imagenet-21k-p"] if pretrained_on else [])]
    own = _DATASETS.get(checkpoint.label_space)
    return ModelCardData(
        license=checkpoint.license,
        library_name="timm",
        pipeline_tag="image-classification",
        tags=[*tags, checkpoint.label_space.replace("_", "-"), checkpoint.head.replace("_", "-")],
        datasets=list(dict.fromkeys([*([own] if own else []), *pretrained_on])) or None,
        model_name=checkpoint.name,
        eval_results=[_eval_result(metric, checkpoint.metrics) for metric in checkpoint.metrics] or None,
    )


def prose_of(text: str, where: str = "The card") -> str:
    """What is written by hand in a card.

    Raises:
        RecordError: The markers are not there once each, in order, so that the hand-written part would be lost.
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
                _millions(parameter_count(checkpoint)),
                "; ".join(f"{metric.value} {metric.name}" for metric in checkpoint.metrics) or None,
                ", ".join(f"{kind} × {count}" if count > 1 else kind for kind, count in kinds.items()) or None,
                checkpoint.license,
            )
        )
    return _table(("name", "label space", "parameters", "published figure", "sources", "licence of the weights"), rows)


def with_zoo_table(readme: str, checkpoints: Iterable[Checkpoint] = CHECKPOINTS) -> str:
    """The text of a README with its table written anew.

    Raises:
        RecordError: It has no place for the table.
    """
    before, _, after = _between(readme, TABLE, "README.md")
    return f"{before}{TABLE[0]}\n{zoo_table(checkpoints)}\n{TABLE[1]}{after}"


def find_checkout() -> Path | None:
    """The checkout that this package is imported from; None for an installed one."""
    folder = Path(__file__).resolve().parents[1]
    return folder if (folder / "pyproject.toml").is_file() and (folder / "README.md").is_file() else None


def planned_files(
    checkout: Path | None, output: Path | None = None, checkpoints: Iterable[Checkpoint] = CHECKPOINTS
) -> dict[Path, str]:
    """All cards, and the README unless ``output`` says where the cards belong, with the text that they should have.

    Args:
        checkout: Where hand-written prose is found and the README stands.
        output: Folder of the cards; by default the checkout's.
        checkpoints: The records.

    Raises:
        InvalidArgumentError: Neither is given.
        RecordError: A file that is there has lost its markers.
    """
    if output is None and checkout is None:
        raise InvalidArgumentError(
            "This package is installed, not a checkout, so there is no README to write; name a folder with --output."
        )
    checkpoints = tuple(checkpoints)
    places = [place for place in (output, checkout / FOLDER if checkout else None) if place is not None]
    files = {places[0] / f"{one.name}.md": render_card(one, _known_prose(one.name, places)) for one in checkpoints}
    if output is None and checkout is not None:
        readme = checkout / "README.md"
        files[readme] = with_zoo_table(readme.read_text(encoding="utf-8"), checkpoints)
    return files


def stale_cards(folder: Path, planned: Iterable[Path]) -> list[Path]:
    """Cards in a folder that belong to no record; they hold prose, so that nobody but a person may delete them."""
    return sorted(
        path
        for path in set(folder.glob("*.md")) - set(planned)
        if PROSE[0] in path.read_text(encoding="utf-8", errors="replace")
    )


def parameter_count(checkpoint: Checkpoint) -> int:
    """Parameters of a record's network, head included; it is built without memory for them."""
    return _count(checkpoint.architecture, len(LabelSpace.load(checkpoint.label_space)))


@functools.cache
def _count(architecture: str, num_classes: int) -> int:
    import torch

    with torch.device("meta"):
        module = convert.build(architecture, num_classes=num_classes)
    return sum(parameter.numel() for parameter in module.parameters())


def _between(text: str, markers: tuple[str, str], where: str) -> tuple[str, str, str]:
    start, end = (text.find(marker) for marker in markers)
    if not 0 <= start < end or any(text.count(marker) != 1 for marker in markers):
        raise RecordError(f"{where} needs {markers[0]} and {markers[1]}, once each, around what it is to keep.")
    return text[:start], text[start + len(markers[0]) : end], text[end + len(markers[1]) :]


def _known_prose(name: str, places: Sequence[Path]) -> str:
    for place in places:
        path = place / f"{name}.md"
        if path.is_file():
            return prose_of(path.read_text(encoding="utf-8"), str(path))
    return ""


def _eval_result(metric: Metric, metrics: Sequence[Metric]) -> EvalResult:
    title, _, split = metric.dataset.partition(", ")
    # The Hub's format has one source for all figures on a data set; theirs must agree, or it would say an untruth.
    one_source = len({other.measured_by for other in metrics if other.dataset == metric.dataset}) == 1
    url = metric.measured_by if one_source and metric.measured_by.startswith("https://") else None
    return EvalResult(
        task_type="image-classification",
        dataset_type=_DATASETS_BY_TITLE.get(title) or _slug(title),
        dataset_name=title,
        dataset_split=split or None,
        metric_type=_METRIC_TYPES.get(metric.name) or _slug(metric.name),
        metric_value=metric.value,
        metric_name=metric.name,
        metric_args={"protocol": metric.protocol, "measured_by": metric.measured_by},
        source_name="ImageNet-21K Pretraining for the Masses" if url == PAPER else None,
        source_url=url,
    )


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(UNKNOWN if cell is None else str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *(line(row) for row in rows)])


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f} M"


def _summary(checkpoint: Checkpoint) -> str:
    home = "this package builds it, timm does not have it" if _is_own(checkpoint) else "timm's name"
    by = f" Its weights were published at {checkpoint.origin}." if checkpoint.origin else ""
    paper = f" The paper is {checkpoint.paper}." if checkpoint.paper else ""
    return (
        f"# {checkpoint.name}\n\n"
        f"An image classifier of the architecture `{checkpoint.architecture}` ({home}) with a "
        f"{_HEADS[checkpoint.head]} head over {LABEL_SPACES[checkpoint.label_space]}: "
        f"{_millions(parameter_count(checkpoint))} parameters.{by}{paper}"
    )


def _is_own(checkpoint: Checkpoint) -> bool:
    return checkpoint.architecture in ARCHITECTURES


def _in_timm(checkpoint: Checkpoint) -> bool:
    """Whether timm has these weights under the same name: told from the record, not from the installed timm."""
    return any(isinstance(one, HubSource) and one.repo_id == f"timm/{checkpoint.name}" for one in checkpoint.sources)


def _kind(source: Source) -> str:
    return "Hub" if isinstance(source, HubSource) else "web" if isinstance(source, URLSource) else "Python package"


def _facts(checkpoint: Checkpoint) -> str:
    space = LabelSpace.load(checkpoint.label_space)
    return _table(
        ("fact", "value"),
        (
            ("name", f"`{checkpoint.name}`"),
            ("architecture", f"`{checkpoint.architecture}`"),
            ("parameters, head included", f"{parameter_count(checkpoint):,}"),
            ("label space", f"`{checkpoint.label_space}`: {LABEL_SPACES[checkpoint.label_space]}"),
            ("sha256 of its wnids, one a line", f"`{space.digest}`"),
            ("outputs", f"{len(space):,}"),
            ("head", f"`{checkpoint.head}`"),
            ("licence of the weights", checkpoint.license),
            ("paper", checkpoint.paper),
            ("published at", checkpoint.origin),
        ),
    )


def _evaluation(checkpoint: Checkpoint) -> str:
    if not checkpoint.metrics:
        return "Accuracy: unknown. Nobody states a figure with its protocol for these weights, and none is made up here."
    rows = [(one.value, one.name, one.dataset, one.protocol, one.measured_by) for one in checkpoint.metrics]
    about = [
        "Values are in percent. A figure belongs to whoever measured it; one that its publisher measured was not "
        "verified here."
    ]
    if checkpoint.head == "semantic_softmax":
        about.append(
            "Semantic top-1 counts an image once for each level that its class and that class's ancestors reach. "
            "It is not the top-1 over all classes and cannot be compared with it."
        )
    return (
        _table(("value", "metric", "images", "protocol", "measured by"), rows)
        + "\n\n"
        + " ".join(about)
        + ("\n\n" + _FALL_ON_WINTER if checkpoint.label_space == "imagenet21k_p_fall11" else "")
    )


_FALL_ON_WINTER = (
    f"A fall11 model that is scored on winter21 loses: the authors' example falls from 75.6 to about 69 ({ISSUES}/13)."
)


def _preprocessing(checkpoint: Checkpoint) -> str:
    channels, height, width = checkpoint.input_size
    table = _table(
        ("setting", "value"),
        (
            ("input", f"{channels} × {height} × {width} (channels, height, width), RGB, pixels scaled to [0, 1]"),
            ("resize", f"`{checkpoint.resize}`: {_RESIZES[checkpoint.resize]}"),
            ("crop_pct", checkpoint.crop_pct),
            ("interpolation", checkpoint.interpolation),
            ("mean", checkpoint.mean),
            ("std", checkpoint.std),
        ),
    )
    note = f'`wn21k_zoo.create_transform("{checkpoint.name}")` is this transform.'
    if checkpoint.resize == "squash" and _in_timm(checkpoint):
        note += (
            " timm's own configuration of these weights says `crop_pct` 0.875 with a centre crop; the published "
            "training code squashes, and so does this package."
        )
    return f"{table}\n\n{note}"


def _labels(checkpoint: Checkpoint) -> str:
    space = LabelSpace.load(checkpoint.label_space)
    about = f"Output i stands for the i-th WordNet id of `LabelSpace.load({checkpoint.label_space!r})`. "
    if checkpoint.head != "semantic_softmax":
        rule = "sum over" if checkpoint.head == "softmax" else "maximum over"
        return (
            f"{about}The {len(space):,} outputs are read by one {_HEADS[checkpoint.head]}. A node of the WordNet tree "
            f"has the {rule} the classes in its subtree; a class that the tree lacks counts for its nearest ancestor "
            "there. `wn21k_zoo.predict` uses the tree `fall11`."
        )
    tree = SemanticTree.load(checkpoint.label_space)
    sizes = [len(level) for level in tree.levels.values()]
    alone = len(tree) - sum(sizes)
    outside = f" {alone} class is alone at its depth and has no softmax of its own." if alone == 1 else ""
    return (
        f"{about}The depth of a class is the number of its ancestors that are classes too, by the tree `{tree.name}`; "
        f"the classes of one depth form a level. The head is a softmax per level, {len(sizes)} of them, with "
        f"{', '.join(f'{size:,}' for size in sizes)} classes from the top down.{outside}\n\n"
        "The probability of a class is its softmax inside its level, and its confidence the minimum of that over the "
        "class and its ancestors. Logits of different levels cannot be compared: one softmax or one argmax over all "
        "outputs is wrong. `wn21k_zoo.predict` reads the head as it was trained."
    )


def _label_issues(checkpoint: Checkpoint) -> str:
    space = LabelSpace.load(checkpoint.label_space)
    times = Counter(space.names)
    shared = sum(times[name] > 1 for name in space.names)
    people = _people(space)
    found = [
        f"{shared:,} of the {len(space):,} classes share their name with another one. A class is its WordNet id; show "
        "the id or the definition where a name is not enough.",
        "The hierarchy is WordNet 3.0 with one parent for each synset. Where WordNet gives several, the others are "
        "lost, so that a label may lack an ancestor that a person expects.",
        f"{len(people):,} classes stand at or below *person* ({PERSON}). What a person is or does cannot be seen in a "
        "photograph; do not use these labels about people.",
    ]
    if checkpoint.label_space == "imagenet21k_p_fall11":
        gone = set(space) - set(LabelSpace.load("imagenet21k_p_winter21"))
        found.append(
            f"ImageNet's winter 2021 release no longer has {len(gone):,} of these classes, {len(gone & people):,} of "
            "which stand there. That release took synsets of people away, some of which are offensive "
            "(https://huggingface.co/datasets/timm/imagenet-22k-wds)."
        )
    if checkpoint.paper == PAPER:
        found.append(
            "An image of ImageNet-21K carries one label, which may be a narrow class or one of its ancestors: some "
            f"pictures of chairs are labelled chair, others furniture ({PAPER}). How many labels are wrong is unknown."
        )
    if checkpoint.label_space == "imagenet1k":
        found.append(
            "At least 6 % of the labels of ImageNet-1K's validation images are estimated to be wrong "
            "(https://arxiv.org/abs/2103.14749)."
        )
    return _bullets(found)


def _people(space: LabelSpace) -> set[str]:
    nouns = load_nouns()
    below = nouns.nearest_members(space.positions, nouns.positions([PERSON])) == 0
    return {space.wnids[index] for index in np.flatnonzero(below)}


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
