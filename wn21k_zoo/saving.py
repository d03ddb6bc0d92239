"""Write a network as a folder that timm, transformers and this package load."""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wn21k_zoo import convert
from wn21k_zoo.architectures import ARCHITECTURES
from wn21k_zoo.building import CONFIG_FILE, OF_ARCHITECTURE, build_from_folder
from wn21k_zoo.cards.sections import library_of, softmax_caution
from wn21k_zoo.checkpoints import WEIGHT_FILES, Head
from wn21k_zoo.errors import InvalidArgumentError, ModelError, PublishError, first_line, whole_number
from wn21k_zoo.files import is_hidden, local_path, replace
from wn21k_zoo.labels import ClassNames, LabelSpace
from wn21k_zoo.markdown import markdown_table
from wn21k_zoo.models import LabelSpaceLike, load_model
from wn21k_zoo.registry import TIMM_PREFIX
from wn21k_zoo.tree import SemanticTree

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CARD_FILE",
    "DTYPES",
    "LABELS_FILE",
    "UPLOADED",
    "card_for",
    "check_target",
    "folder_config",
    "folder_labels",
    "own_card",
    "save_model",
    "write_export",
]

CARD_FILE = "README.md"
LABELS_FILE = "wn21k_labels.json"
DTYPES = ("float32", "float16", "bfloat16")
_TEMPORARY = ".wn21k-export-"
# The files of a folder that are uploaded: what we wrote, and nothing else that may be there.
UPLOADED = (CARD_FILE, CONFIG_FILE, LABELS_FILE, WEIGHT_FILES[0])
RECORD_FILE = "record.py"
_PLACE, _PLACE_IN_TIMM = '"FOLDER"', '"local-dir:FOLDER"'  # in the examples of a card
_PIPELINE = 'pipeline("image-classification", '
_WRITTEN = (*UPLOADED, RECORD_FILE)


def save_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    label_space: LabelSpaceLike,
    head: Head | None = None,
    image_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Save a timm network that you trained as a folder that timm, transformers and this package load.

    ``wn21k_zoo.predict(image, model=FOLDER)`` reads its outputs as they were trained, and ``wn21k publish`` uploads it.
    The folder appears only once it is complete and the network, built anew, gave the same outputs. (For an OFA network
    timm needs ``import wn21k_zoo.timm_models``; transformers cannot load it.) Mean, deviation, interpolation and crop
    of its images are those of ``model.pretrained_cfg``: change these first if it was trained with others.

    Args:
        model: The network, in timm's class, with the head that it was trained with.
        folder: Output folder.
        label_space: Classes of its outputs, as :func:`wn21k_zoo.models.load_model` takes them: wnids, a name, or
            :class:`ClassNames` for classes that are not synsets.
        head: How its outputs are read: ``semantic_softmax``, ``softmax`` or ``sigmoid``; needed for classes on several
            levels.
        image_size: Height and width of the images it was trained for, if not ``img_size`` of ``model_args`` or those of
            its pretrained configuration.
        model_args: Arguments with which it was created, beside the number of classes, such as ``img_size``.
        dtype: Data type of the weights, unchanged by default: 'float32', 'float16' or 'bfloat16'.
        force: Replace the folder of a former export.

    Returns:
        The folder.

    Raises:
        InvalidArgumentError: It is not a timm network, the folder is not empty, another argument is not allowed, or
            weights are too large for float16.
        LabelSpaceError, UnknownLabelSpaceError, UnknownSynsetError: The classes are not those of the outputs.
        ModelError: timm would build another network.
        PublishError: The folder cannot be written.
    """
    import torch

    target = check_target(folder, dtype, force)
    loaded = load_model(_unwrapped(model), label_space=label_space, head=head)
    settings = getattr(loaded.module, "pretrained_cfg", None) or {}
    if loaded.data_config is None or not settings.get("architecture") or not hasattr(loaded.module, "num_features"):
        raise InvalidArgumentError(
            f"{loaded.name} does not say which timm network it is; pass one that timm or wn21k_zoo created, or the one "
            "that this wraps (module.module)."
        )
    arguments, data_config = _checked_arguments(model_args or {}), dict(loaded.data_config)
    channels, height, width = data_config["input_size"]
    if image_size is not None or isinstance(arguments.get("img_size"), int):
        height = width = whole_number("image_size", arguments.get("img_size") if image_size is None else image_size, 1)
    data_config["input_size"] = (arguments.get("in_chans", channels), height, width)
    kept = {key: settings[key] for key in OF_ARCHITECTURE if settings.get(key) is not None}
    architecture = str(settings["architecture"]).removeprefix(TIMM_PREFIX)
    config = folder_config(
        architecture,
        {**kept, **data_config, "num_classes": len(loaded.label_space)},
        loaded.module,
        loaded.label_space,
        loaded.head,
    )
    if arguments:
        config["model_args"] = arguments
    labels = folder_labels(loaded.label_space, loaded.head) if isinstance(loaded.label_space, LabelSpace) else None
    card = own_card(target.name, architecture, len(loaded.label_space), loaded.head)
    with torch.random.fork_rng(devices=[]):  # new networks draw their weights, and a training loop may go on
        _check_built_anew(loaded.module, architecture, len(loaded.label_space), arguments, data_config["input_size"])
        return write_export(target, loaded.module, config, labels, card, dtype)


def _check_built_anew(
    module: nn.Module,
    architecture: str,
    num_classes: int,
    arguments: Mapping[str, Any],
    input_size: tuple[int, int, int],
) -> None:
    """Check that timm builds the same network; loading would resample position embeddings to another image size."""
    import torch

    try:
        built = convert.build(architecture, num_classes=num_classes, **arguments).eval()
    except Exception as error:  # timm has many ways to refuse an argument
        raise ModelError(f"{architecture} cannot be built with these model_args: {first_line(error)}") from error
    try:
        ours = copy.deepcopy(module).to("cpu", torch.float32).eval()
    except Exception as error:  # FSDP refuses it; so do weights without data
        raise _not_plain(architecture, module.state_dict(), error) from error
    advice = (
        "give the arguments that it was created with as model_args; layers that were replaced cannot be saved (merge "
        "adapters, such as LoRA's, into the weights first)."
    )
    found, expected = ours.state_dict(), built.state_dict()
    for name in (*found, *expected):
        shapes = [list(state[name].shape) if name in state else "missing" for state in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ModelError(f"timm builds another {architecture}: {name} is {shapes[1]}, not {shapes[0]}; {advice}")
    try:
        built.load_state_dict(found)
    except RuntimeError as error:
        raise _not_plain(architecture, found, error) from error
    try:
        with torch.inference_mode():
            image = torch.rand(1, *input_size, generator=torch.Generator().manual_seed(0))
            one, other = ours(image), built(image)
    except Exception as error:  # each network has its own
        size = " x ".join(map(str, input_size[1:]))
        raise ModelError(f"{architecture} takes no images of {size} ({first_line(error)}); set image_size.") from error
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-4, equal_nan=True):
        raise ModelError(f"timm builds another {architecture}, which gives other outputs; {advice}")


def _not_plain(architecture: str, weights: Mapping[str, Any], error: Exception) -> ModelError:
    kinds = sorted({type(value).__name__ for value in weights.values()} - {"Tensor"})
    what = f"are no plain tensors ({', '.join(kinds)})" if kinds else f"cannot be copied ({first_line(error)})"
    return ModelError(
        f"The weights of this {architecture} {what}; save it before it is quantized, or load its gathered weights into "
        "a network that is not sharded, and save that."
    )


def _unwrapped(model: Any) -> Any:
    from torch import nn

    if not isinstance(model, nn.Module):
        raise InvalidArgumentError(
            f"model is a {type(model).__name__}; pass a torch module (wn21k export takes the name of a model)."
        )
    return getattr(model, "_orig_mod", model)  # of torch.compile


def _checked_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(arguments, Mapping):
        raise InvalidArgumentError(f"model_args is a {type(arguments).__name__}; give a dict.")
    for name in arguments:
        if name in (*convert.OF_WEIGHTS, "features_only", "model_name", "num_classes"):
            raise InvalidArgumentError(f"model_args cannot have {name}; leave it out.")
    try:
        return cast("dict[str, Any]", json.loads(json.dumps(dict(arguments), allow_nan=False)))
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError(f"model_args cannot be written as JSON: {first_line(error)}") from error


def check_target(folder: str | os.PathLike[str], dtype: str | None, force: bool) -> Path:
    """Return the absolute path of a folder for an export; leftovers of a killed export there are removed.

    Raises:
        InvalidArgumentError: It is a file, is not empty, or holds what no export writes; the dtype is another one.
    """
    target = Path(os.path.realpath(local_path(folder, InvalidArgumentError)))  # also for circular links
    if dtype is not None and dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}.")
    if target.exists() and not target.is_dir():
        raise InvalidArgumentError(f"{target} is a file; name a folder.")
    there = target.iterdir() if target.is_dir() else ()
    others = [path for path in there if not is_hidden(path.name)]  # not .git, .DS_Store
    if others and not force:
        raise InvalidArgumentError(
            f"{target} is not empty; choose another folder, or replace it with force=True (--force)."
        )
    for left in target.glob(f"{_TEMPORARY}*"):  # of an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    foreign = [path.name for path in others if path.name not in _WRITTEN or not path.is_file()]
    if foreign:
        raise InvalidArgumentError(f"{target} holds {min(foreign)}, which no export writes; choose another folder.")
    return target


def write_export(
    target: Path,
    module: nn.Module,
    config: Mapping[str, Any],
    labels: Mapping[str, Any] | None,
    card: str,
    dtype: str | None = None,
    record: str | None = None,
) -> Path:
    """Write weights, configuration, labels, card and draft of a record; they appear only once all are complete.

    Raises:
        PublishError: It cannot be written.
        ModelError: What was written cannot be loaded.
    """
    with _whole_folder(target) as temporary:
        _write_weights(module, temporary / WEIGHT_FILES[0], dtype)
        _write_json(config, temporary / CONFIG_FILE)
        if labels is not None:
            _write_json(labels, temporary / LABELS_FILE)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8", newline="\n")
        if record is not None:
            (temporary / RECORD_FILE).write_text(record, encoding="utf-8", newline="\n")
        build_from_folder(temporary, temporary / WEIGHT_FILES[0])  # checks that what was written can be loaded
    return target


def folder_config(
    architecture: str,
    settings: Mapping[str, Any],
    module: nn.Module,
    classes: LabelSpace | ClassNames,
    head: Head,
) -> dict[str, Any]:
    """Make timm's configuration, plus how to read the outputs, as other programs copy this file alone.

    It lacks ``model_args``: transformers fails if these repeat the number of classes.

    Args:
        architecture: Name of the network, without our prefix.
        settings: Its pretrained configuration.
        module: The network.
        classes: Class of each output.
        head: How to read them.
    """
    config = {
        "architecture": f"{TIMM_PREFIX}{architecture}" if architecture in ARCHITECTURES else architecture,
        "num_classes": len(classes),
        "num_features": cast(Any, module).num_features,
        "label_names": list(classes.unique_names if isinstance(classes, LabelSpace) else classes),
    }
    if isinstance(classes, LabelSpace):
        described = dict(zip(classes.unique_names, classes.definitions, strict=True))
        outputs = {"label_descriptions": described, **_outputs(classes, head)}
    else:
        outputs = {"label_space": "own", "head": head}  # also where a name looks like a wnid
    if head == "sigmoid":
        outputs["problem_type"] = "multi_label_classification"  # for transformers, which takes a softmax otherwise
    settings = {key: value for key, value in settings.items() if key != "architecture"}
    return {**config, **outputs, "pretrained_cfg": settings}


def _outputs(space: LabelSpace, head: Head) -> dict[str, Any]:
    return {"label_space": space.name, "head": head, "wnids": list(space.wnids)}


def folder_labels(space: LabelSpace, head: Head) -> dict[str, Any]:
    """Make what timm does not ask for: the kind of head, the wnids and a tree."""
    own = head == "semantic_softmax"
    tree = SemanticTree.from_label_space(space) if own else SemanticTree.load("fall11")
    return {
        "about": (
            "wnids: WordNet 3.0 noun id of each output. head: how outputs become probabilities; semantic_softmax is a "
            "softmax over the outputs of each depth. tree: nodes with the index of each one's parent, -1 for a root; a "
            "node's depth is the number of its ancestors."
        ),
        "digest": space.digest,
        **_outputs(space, head),
        "tree": {"name": tree.name, "wnids": list(tree.wnids), "parents": tree.parents.tolist()},
    }


def own_card(
    name: str,
    architecture: str,
    num_classes: int,
    head: Head,
    about: str = "",
    figures: Sequence[Sequence[Any]] = (),
    more: Sequence[str] = (),
) -> str:
    """Write the card of a network that is no record.

    Args:
        name: Title.
        architecture: Name of the network, without our prefix.
        num_classes: Number of its outputs.
        head: How to read them.
        about: How it was made, for the end of the sentence about it.
        figures: Rows of name, percent, images and protocol.
        more: Lines at the end.
    """
    from huggingface_hub import ModelCardData

    is_ours = architecture in ARCHITECTURES
    library = library_of(architecture)
    header = ModelCardData(
        library_name=library, pipeline_tag="image-classification", tags=["image-classification", library]
    )
    ours = ["```python", "import wn21k_zoo", "", f'wn21k_zoo.predict("photo.jpg", model={_PLACE})', "```"]
    registered = ["import wn21k_zoo.timm_models"] if is_ours else []
    timms = [
        "```python",
        "import timm",
        *registered,
        "",
        f"timm.create_model({_PLACE_IN_TIMM}, pretrained=True)",
        "```",
    ]
    pipeline = f'{_PIPELINE}{_PLACE})("photo.jpg"){softmax_caution(head)}'
    transformers = ["", "```python", "from transformers import pipeline", "", pipeline, "```"]
    table = markdown_table(("figure", "percent", "images", "protocol"), figures) if figures else "Not evaluated."
    parts = [
        *("---", header.to_yaml().strip(), "---", "", f"# {name}", ""),
        f"{architecture} for {num_classes:,} classes{about}. Licence: not stated yet.",
        *("", table, "", *ours, "", *timms),
        *([] if is_ours else transformers),
        *("", *more),
    ]
    return "\n".join(parts).rstrip() + "\n"


def card_for(repo_id: str, revision: str | None, card: str) -> str:
    """Fill in the repository, and a branch other than main, in the examples of a card that :func:`own_card` wrote."""
    named = revision is not None and revision != "main"
    card = card.replace(
        f"{_PIPELINE}{_PLACE}", f'{_PIPELINE}"{repo_id}"' + (f', revision="{revision}"' if named else "")
    )
    for place in (_PLACE_IN_TIMM, _PLACE):
        card = card.replace(place, f'"hf-hub:{repo_id}{f"@{revision}" if named else ""}"')
    return card


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Make a temporary folder whose files become the target's at the end; it is removed if something fails.

    It is next to a new target, whose place it takes, but inside an existing one, which may be a mount point or the
    current folder.
    """
    exists = target.is_dir()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not by tempfile, whose folders only their owner can use.
        temporary = (target if exists else target.parent) / f"{_TEMPORARY}{secrets.token_hex(8)}"
        temporary.mkdir()
    except OSError as error:
        raise PublishError(f"{target} cannot be written ({error.strerror}); choose another place.") from error
    try:
        yield temporary
        if exists:
            _replace_files(target, temporary)
        else:
            replace(temporary, target, patience=10)
    except OSError as error:
        raise PublishError(f"{target} cannot be written ({first_line(error)}); choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_files(target: Path, temporary: Path) -> None:
    """Remove the configuration first and add it last: without it a mixture of old and new files cannot be loaded."""
    new = sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG_FILE)
    former = temporary / "former"
    former.mkdir()
    try:
        for name in (CONFIG_FILE, *(name for name in _WRITTEN if name != CONFIG_FILE)):
            if (target / name).is_file():
                replace(target / name, former / name)
        for path in new:
            replace(path, target / path.name)
    except OSError:
        for path in former.iterdir():
            replace(path, target / path.name)
        raise


def _write_weights(module: nn.Module, path: Path, dtype: str | None) -> None:
    import torch

    kind = getattr(torch, dtype) if dtype else None
    state = {}
    for key, value in module.state_dict().items():
        state[key] = value.to(kind) if kind is not None and value.is_floating_point() else value
        if state[key].dtype == torch.float16 and bool((state[key].isinf() & value.isfinite()).any()):
            raise InvalidArgumentError(f"{key} has values too large for float16; use bfloat16 or float32.")
    convert.write_safetensors(state, path)


def _write_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")
