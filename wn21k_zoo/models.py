"""Load a model, however it is named, with its label space, head and preprocessing."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union

from wn21k_zoo import download, registry
from wn21k_zoo.building import (
    CONFIG_FILE,
    HUB_PREFIX,
    as_folder,
    build_checkpoint,
    build_from_folder,
    configured_folder,
    fetch_from_hub,
    read_config,
    settings_of,
    weights_in,
)
from wn21k_zoo.checkpoints import DEFAULT_CHECKPOINT, EMBEDDED_CHECKPOINT, HEADS, Checkpoint, Head, check_head
from wn21k_zoo.errors import (
    DuplicateSynsetError,
    EmptyLabelSpaceError,
    InvalidArgumentError,
    LabelSpaceError,
    MissingExtraError,
    ModelError,
    UnknownModelError,
    UnknownSynsetError,
    UnresolvedLabelSpaceError,
    Wn21kError,
    first_line,
    whole_number,
)
from wn21k_zoo.labels import LABEL_SPACES, ClassNames, LabelSpace
from wn21k_zoo.on_disk import find_local
from wn21k_zoo.synsets import WNID_PATTERN, load_nouns
from wn21k_zoo.tree import SemanticTree

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Classes",
    "FallbackModelWarning",
    "LabelSpaceLike",
    "LoadedModel",
    "ModelLike",
    "build_transform",
    "choose_default",
    "create_transform",
    "head_of",
    "load_model",
    "outputs_of",
    "short_side",
    "stated_outputs",
]

ModelLike = Union[str, os.PathLike[str], "nn.Module"]
Classes = LabelSpace | ClassNames
LabelSpaceLike = str | os.PathLike[str] | Classes | Sequence[str]
Given = Classes | Literal["own"] | None

_LOG = logging.getLogger(__name__)


class FallbackModelWarning(UserWarning):
    """No model was named and the 21K default is not available, so the embedded ImageNet-1K model is used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A module that is ready to run.

    Attributes:
        name: Its name in results.
        module: The network; logits have the shape [batch, len(label_space)].
        label_space: Class of each logit; :class:`ClassNames` if they are not synsets.
        head: How to read the logits.
        data_config: Preprocessing as arguments of ``timm.data.create_transform``; None if unknown.
        owned: Whether it was loaded here, so that it may be moved and put into evaluation mode for good.
    """

    name: str
    module: nn.Module
    label_space: Classes
    head: Head
    data_config: Mapping[str, Any] | None
    owned: bool


def load_model(
    model: ModelLike | None = None,
    *,
    label_space: LabelSpaceLike | None = None,
    head: Head | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> LoadedModel:
    """Load a model for prediction, on the CPU and in evaluation mode.

    Args:
        model: A record's name, a timm name with a known label space, a folder with ``config.json`` and weights,
            ``hf-hub:ORG/NAME[@REVISION]``, a module (used as it is), or None for :func:`choose_default`.
        label_space: Classes of the outputs of a module or a folder: a shipped name, a text file of wnids, wnids or a
            :class:`LabelSpace`; :class:`ClassNames` for classes that are not synsets, or ``own`` for the folder's own
            names.
        head: How to read the outputs of a module, or of a folder that does not say: ``semantic_softmax`` (a softmax per
            level, as :class:`wn21k_zoo.training.losses.SemanticSoftmaxLoss` trains), ``softmax`` or ``sigmoid``. If all
            classes are on one level, or are not synsets, it defaults to softmax.
        cache_dir: Cache folder.

    Raises:
        InvalidArgumentError: There is no such head, or none is given where one is needed.
        UnknownModelError: No model has that name.
        UnresolvedLabelSpaceError: The classes of its outputs are not known.
        LabelSpaceError: The number of classes is not the model's number of outputs.
        UnknownLabelSpaceError, UnknownSynsetError: There are no such classes.
        ModelError: It cannot be built or its weights do not fit; more specific are :class:`WeightsNotFoundError`,
            :class:`ChecksumError` and :class:`DownloadError`.
        MissingExtraError: Its weights are in an extra that is not installed.
    """
    if head is not None:
        check_head(head)
    space = _as_label_space(label_space)
    if model is None:
        model = choose_default(cache_dir)
    if not isinstance(model, (str, os.PathLike)):
        return _from_module(model, space, head)
    name = os.fspath(model)
    if name.startswith(HUB_PREFIX):
        config, weights = fetch_from_hub(name, cache_dir)
        return _load_folder(name, config.path.parent, weights.path, space, head)
    if (folder := as_folder(model)) is not None:
        return _load_folder(str(folder), folder, None, space, head)
    checkpoint = registry.resolve_checkpoint(name)
    if space is not None or head is not None:
        raise InvalidArgumentError(
            f"{name} states its own label space and head; leave out label_space and head, or load the module yourself."
        )
    return LoadedModel(
        name=checkpoint.name,
        module=build_checkpoint(checkpoint, pretrained=True, cache_dir=cache_dir).eval(),
        label_space=LabelSpace.load(checkpoint.label_space),
        head=checkpoint.head,
        data_config=checkpoint.data_config,
        owned=True,
    )


def choose_default(cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Choose the model to use when none is named.

    The environment variable ``WN21K_MODEL``; else the 21K default if its weights are on this machine, or if one
    request of at most half a second shows that they can be downloaded; else the embedded ImageNet-1K model, with a
    :class:`FallbackModelWarning`.

    Args:
        cache_dir: Cache folder.

    Raises:
        MissingExtraError: Neither the 21K default nor the embedded model is available.
    """
    if named := os.environ.get("WN21K_MODEL"):
        return named
    default = registry.get_checkpoint(DEFAULT_CHECKPOINT)
    if find_local(default, cache_dir) is not None or _default_is_reachable():
        return DEFAULT_CHECKPOINT
    embedded, why = registry.get_checkpoint(EMBEDDED_CHECKPOINT), "is neither cached nor reachable"
    if find_local(embedded) is None:
        raise MissingExtraError(
            f"The default model {DEFAULT_CHECKPOINT} {why}. Connect to the network, or use the embedded model, which",
            "embedded",
        )
    warnings.warn(
        f"{DEFAULT_CHECKPOINT} {why}; using {EMBEDDED_CHECKPOINT} (ImageNet-1K) instead. "
        "Choose a model by --model, model= or WN21K_MODEL.",
        FallbackModelWarning,
        stacklevel=3,
    )
    return EMBEDDED_CHECKPOINT


def create_transform(
    name: str | os.PathLike[str],
    training: bool = False,
    *,
    image_size: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Any:
    """Create the preprocessing of a model: a transform from an RGB PIL image to a float32 tensor [3, H, W].

    Args:
        name: A record, a timm model with a known label space, a folder, or ``hf-hub:ORG/NAME[@REVISION]``.
        training: timm's training transform (random resized crop, flip, colour jitter) with the model's size,
            interpolation, mean and std, instead of the one for predictions.
        image_size: H and W, if not the model's.
        cache_dir: Cache folder.

    Raises:
        UnknownModelError, UnresolvedLabelSpaceError: As :func:`wn21k_zoo.registry.resolve_checkpoint`.
        ModelError: The configuration of a folder or repository cannot be obtained.
        InvalidArgumentError: ``image_size`` is not a positive number.
    """
    from timm.data import resolve_data_config

    side = None if image_size is None else whole_number("image_size", image_size, 1)
    folder = configured_folder(name, cache_dir)
    if folder is None:
        data_config: Mapping[str, Any] = registry.resolve_checkpoint(os.fspath(name)).data_config
    else:
        config = read_config(folder)
        own = resolve_data_config(pretrained_cfg=settings_of(config))
        known = None if _is_export(config) else _checkpoint_of_config(config)
        data_config = _published_data_config(known, own)
    if side is not None:
        data_config = {**data_config, "input_size": (data_config["input_size"][0], side, side)}
    return build_transform(data_config, training=training)


def build_transform(data_config: Mapping[str, Any], training: bool = False, **options: Any) -> Any:
    """Build the transform for the ``data_config`` of a :class:`LoadedModel`; ``options`` are more of timm's arguments.

    Raises:
        ModelError: It is not possible, as of a damaged configuration.
    """
    import timm.data

    settings = dict(data_config)
    if training:
        settings.pop("crop_pct", None)
        settings.pop("crop_mode", None)
    try:
        return timm.data.create_transform(**settings, is_training=training, **options)
    except Exception as error:  # timm and torch do not check what they are given
        raise ModelError(f"No images can be prepared according to {settings}: {first_line(error)}") from error


def short_side(data_config: Mapping[str, Any]) -> float | None:
    """Pixels to which the shorter side is resized before the crop; None if the aspect ratio does not matter."""
    if data_config.get("crop_mode", "center") != "center":
        return None
    return float(max(data_config["input_size"][1:]) / data_config["crop_pct"])


@functools.cache
def _default_is_reachable() -> bool:
    return download.is_reachable(registry.get_checkpoint(DEFAULT_CHECKPOINT))


def _load_folder(name: str, folder: Path, weights: Path | None, space: Given, head: Head | None) -> LoadedModel:
    import timm

    config = read_config(folder)
    weights = weights or weights_in(folder)
    classes, head = outputs_of(config, folder, space, head)
    module = build_from_folder(folder, weights).eval()
    _check_outputs(module, classes, name)
    # An export states its own preprocessing.
    known = None if _is_export(config) else _checkpoint_of_config(config)
    return LoadedModel(
        name=name,
        module=module,
        label_space=classes,
        head=head_of(classes, name, head),
        data_config=_published_data_config(known, timm.data.resolve_model_data_config(module)),
        owned=True,
    )


def outputs_of(
    config: Mapping[str, Any], folder: Path, space: Given = None, head: Head | None = None
) -> tuple[Classes, Head | None]:
    """Return the classes of a folder's outputs and how to read these (None if it does not say), or what is asked for.

    Raises:
        UnresolvedLabelSpaceError: The classes are not known.
        ModelError: As :func:`stated_outputs`.
    """
    asked = space == "own" or (space is not None and head is not None)
    stated = None if asked else stated_outputs(config, folder)
    if space != "own" and head is not None:
        _warn_of_other_outputs(config, folder, space, head)
    if stated is not None and (space is None or _speak_alike(space, stated[0])):
        return stated[0], head or stated[1]
    says_own = config.get("label_space") == "own"
    if space == "own" or (space is None and says_own):
        is_sigmoid = says_own and config.get("head") == "sigmoid"  # else one softmax
        return _own_names(config, folder), head or ("sigmoid" if is_sigmoid else None)
    known = _checkpoint_of_config(config)
    classes = _label_space_of_config(config, known, folder) if space is None else space
    return classes, head or (known.head if known is not None and _speaks(known, classes) else None)


def _warn_of_other_outputs(config: Mapping[str, Any], folder: Path, space: Given, head: Head) -> None:
    """Warn if a caller asks for other classes or another head than a folder states: that may be a new network."""
    with contextlib.suppress(ModelError):
        stated = stated_outputs(config, folder)
        if stated is not None and (head != stated[1] or (space is not None and tuple(space) != tuple(stated[0]))):
            _LOG.warning(
                "%s states a %s over %s; its outputs are read as %s%s all the same, as asked",
                folder, stated[1], stated[0].name, head, f" over {space.name}" if isinstance(space, Classes) else "",
            )  # fmt: skip


def _published_data_config(known: Checkpoint | None, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's own preprocessing, except that timm's configurations of 21K-P heads say crop where squash is right."""
    return known.data_config if known is not None and known.head == "semantic_softmax" else own


def _checkpoint_of_config(config: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint that a folder is a copy of, if its configuration names one and has as many classes."""
    settings = settings_of(config)
    try:
        checkpoint = registry.find_record(config["architecture"], settings["tag"]) or registry.resolve_checkpoint(
            f"{config['architecture']}.{settings['tag']}"
        )
    except (KeyError, UnknownModelError, UnresolvedLabelSpaceError):
        return None
    num_classes = config.get("num_classes", settings.get("num_classes"))
    return checkpoint if num_classes == len(LabelSpace.load(checkpoint.label_space)) else None


def stated_outputs(config: Mapping[str, Any], folder: Path) -> tuple[LabelSpace, Head] | None:
    """Return the classes and head that an export's configuration states; None for no export or for changed classes.

    Other programs keep these entries when they save the network again. Changed classes show in their number or names;
    if both are the same, the change cannot be detected.

    Raises:
        ModelError: It is damaged.
    """
    if not _is_export(config):
        return None
    try:
        name, wnids, head = str(config["label_space"]), tuple(config["wnids"]), config["head"]
        if head not in HEADS:
            raise ValueError(f"there is no head {head!r}")
        space = LabelSpace(name, wnids)
    except (ValueError, TypeError, Wn21kError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} is damaged, export the model again: {first_line(error)}") from error
    names, num_classes = config.get("label_names"), config.get("num_classes", len(space))
    return (space, head) if num_classes == len(space) and tuple(names or ()) == space.unique_names else None


def _is_export(config: Mapping[str, Any]) -> bool:
    return all(config.get(key) is not None for key in ("label_space", "head", "wnids"))


def _label_space_of_config(config: Mapping[str, Any], known: Checkpoint | None, folder: Path) -> Classes:
    names = config.get("label_names")
    if names:
        known_space = LabelSpace.load(known.label_space) if known else None
        if known_space is not None:
            if tuple(names) in (known_space.wnids, known_space.unique_names, known_space.names):
                return known_space
        elif not any(isinstance(name, str) and WNID_PATTERN.fullmatch(name) for name in names):
            return _described_synsets(config, folder) or _own_names(config, folder)
        try:
            return LabelSpace(folder.name, tuple(names))
        except (UnknownSynsetError, DuplicateSynsetError) as error:  # a typo, or other classes than the checkpoint's
            raise UnresolvedLabelSpaceError(
                f"{folder} seems to have synsets as its classes, but {str(error).partition(';')[0].rstrip('.')}. Give "
                "label_space (--label-space): a name or wnids, or own, for its names as they are."
            ) from None
    if known is None:
        raise UnresolvedLabelSpaceError(
            f"{folder} does not say which WordNet synsets its outputs are; give label_space: a name such as "
            "imagenet1k, wnids, or ClassNames for classes that are not synsets."
        )
    return LabelSpace.load(known.label_space)


def _described_synsets(config: Mapping[str, Any], folder: Path) -> LabelSpace | None:
    """The synsets behind names and definitions as exports have them, all that timm keeps of these; None for others."""
    described = config.get("label_descriptions") or settings_of(config).get("label_descriptions")
    if not isinstance(described, Mapping):
        return None
    nouns = load_nouns()
    wnids = {
        key: f"n{offset:08d}"
        for key, offset in zip(zip(nouns.names, nouns.definitions, strict=True), nouns.offsets.tolist(), strict=True)
    }
    found = [  # a name that is not unique has its wnid
        wnids.get((re.sub(r" \(n\d{8}\)$", "", name), str(described.get(name))), "") if isinstance(name, str) else ""
        for name in config["label_names"]
    ]
    with contextlib.suppress(LabelSpaceError, UnknownSynsetError):
        space = LabelSpace(folder.name, tuple(found))
        shipped = (LabelSpace.load(name) for name in LABEL_SPACES)
        return next((each for each in shipped if each.wnids == space.wnids), space)
    return None


def _own_names(config: Mapping[str, Any], folder: Path) -> ClassNames:
    try:
        return ClassNames(config.get("label_names") or ())
    except (EmptyLabelSpaceError, InvalidArgumentError) as error:
        raise UnresolvedLabelSpaceError(f"{folder} does not name its classes; give label_space. ({error})") from None


def _from_module(module: Any, space: Given, head: Head | None) -> LoadedModel:
    from timm.data import resolve_data_config
    from torch import nn

    if not isinstance(module, nn.Module):
        raise InvalidArgumentError(f"model is a {type(module).__name__}; give a name, a folder or a torch module.")
    if space is None or space == "own":
        raise UnresolvedLabelSpaceError(
            "A module does not state its classes; give label_space: a name such as imagenet1k, wnids, or ClassNames "
            "for classes that are not synsets."
        )
    _check_outputs(module, space, type(module).__name__)
    settings = getattr(module, "pretrained_cfg", None)
    known = None
    if settings:
        config = {**settings, "num_classes": len(space)}
        known = _checkpoint_of_config({"architecture": settings.get("architecture"), "pretrained_cfg": config})
        known = known if _speaks(known, space) else None
    return LoadedModel(
        name=type(module).__name__,
        module=module,
        label_space=space,
        head=head_of(space, type(module).__name__, head or (known.head if known is not None else None)),
        data_config=_published_data_config(known, resolve_data_config(pretrained_cfg=settings)) if settings else None,
        owned=False,
    )


def _speaks(known: Checkpoint | None, space: Classes) -> bool:
    """Whether the outputs of a checkpoint stand for these classes in this order."""
    return known is not None and _speak_alike(space, LabelSpace.load(known.label_space))


def _speak_alike(space: Given, other: LabelSpace) -> bool:
    return isinstance(space, LabelSpace) and space.wnids == other.wnids


def head_of(space: Classes, name: str, head: Head | None) -> Head:
    """How to read outputs over these classes, where ``head`` is what is said of it.

    Raises:
        InvalidArgumentError: Nothing says so, or it does not fit.
    """
    if isinstance(space, ClassNames) and head == "semantic_softmax":
        raise InvalidArgumentError(f"The classes of {name} are not synsets and have no levels; head cannot be {head}.")
    if head is not None:
        return head
    if isinstance(space, ClassNames) or not SemanticTree.from_label_space(space).depths.any():
        return "softmax"
    raise InvalidArgumentError(
        f"Nothing says how to read the outputs of {name}; give head (--head): softmax, over all classes; "
        "semantic_softmax, one per level, as SemanticSoftmaxLoss trains; or sigmoid."
    )


def _check_outputs(module: nn.Module, space: Classes, name: str) -> None:
    outputs: Any = None
    with contextlib.suppress(AttributeError, TypeError):  # for a network that is not timm's
        classifier: Any = module.get_classifier()  # type: ignore[operator]
        classifier = classifier[-1] if isinstance(classifier, tuple) else classifier
        # Ask the layer itself, since it may have been replaced.
        outputs = getattr(classifier, "out_features", getattr(classifier, "out_channels", None))
    if isinstance(outputs, int) and outputs != len(space):
        raise LabelSpaceError(f"{name} has {outputs:,} outputs, but {space.name} has {len(space):,} classes.")


def _as_label_space(label_space: LabelSpaceLike | None) -> Given:
    if label_space is None or isinstance(label_space, ClassNames):
        return label_space
    if label_space == "own":
        return "own"
    try:
        return LabelSpace.find(label_space)
    except UnknownSynsetError as error:
        if isinstance(label_space, (str, os.PathLike)):
            raise
        raise UnknownSynsetError(f"{error} ClassNames takes the names of classes that are not synsets.") from None
