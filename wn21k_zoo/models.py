"""From whatever names a model to a loaded module with its label space, head and preprocessing."""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wn21k_zoo import convert, download, registry
from wn21k_zoo.architectures import ARCHITECTURES, ofa
from wn21k_zoo.checkpoints import (
    CHECKPOINTS,
    DEFAULT_CHECKPOINT,
    EMBEDDED_CHECKPOINT,
    Checkpoint,
    Head,
    HubSource,
)
from wn21k_zoo.errors import (
    InvalidArgumentError,
    LabelSpaceError,
    MissingExtraError,
    ModelError,
    UnknownModelError,
    UnresolvedLabelSpaceError,
    WeightsNotFoundError,
    first_line,
)
from wn21k_zoo.labels import LabelSpace

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = [
    "FallbackModelWarning",
    "LoadedModel",
    "build_checkpoint",
    "choose_default",
    "create_model",
    "create_transform",
    "fetch_from_hub",
    "load_model",
    "pretrained_config",
    "select_device",
]

if TYPE_CHECKING:
    ModelLike = str | os.PathLike[str] | nn.Module
LabelSpaceLike = str | LabelSpace | Sequence[str]

HEADS: tuple[Head, ...] = ("semantic_softmax", "softmax", "sigmoid")
HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# Of a pretrained configuration: where weights come from by hand, and what belongs to the architecture.
_OWN_WEIGHTS = ("state_dict", "file")
_OF_ARCHITECTURE = ("first_conv", "classifier", "pool_size", "fixed_input_size", "min_input_size")


class FallbackModelWarning(UserWarning):
    """No model was named and the 21K default is not to be had, so the embedded ImageNet-1K one is used."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedModel:
    """A module that is ready to run.

    Attributes:
        name: What results call it.
        module: The network; logits have the shape [batch, len(label_space)].
        label_space: Class of each logit.
        head: How the logits are to be read.
        data_config: Preprocessing as ``timm.data.create_transform`` takes it; None when nobody says.
        owned: Whether it was loaded here, so that it may be moved and put into evaluation mode for good.
    """

    name: str
    module: nn.Module
    label_space: LabelSpace
    head: Head
    data_config: Mapping[str, Any] | None
    owned: bool


def load_model(
    model: ModelLike | None = None,
    *,
    label_space: LabelSpaceLike | None = None,
    head: Head | None = None,
) -> LoadedModel:
    """Load a model for prediction, on the CPU and in evaluation mode.

    Args:
        model: A record's name, a timm name with a known label space, a folder with ``config.json`` and weights,
            ``hf-hub:ORG/NAME[@REVISION]``, a module (taken as it is), or None for :func:`choose_default`.
        label_space: Classes of the outputs of a module or a folder: a shipped name, wnids or a :class:`LabelSpace`.
        head: How to read the outputs of a module or a folder, 'softmax' when nobody says otherwise.

    Raises:
        UnknownModelError: Nothing answers to that name.
        UnresolvedLabelSpaceError: The classes of its outputs are not known.
        LabelSpaceError: The label space has another number of classes than the model has outputs.
        ModelError: It cannot be built or its weights do not fit; :class:`WeightsNotFoundError`,
            :class:`ChecksumError` and :class:`DownloadError` say so more precisely.
        MissingExtraError: Its weights are in an extra that is not installed.
    """
    if head is not None and head not in HEADS:
        raise InvalidArgumentError(f"head is {head!r}; it can be {', '.join(HEADS)}.")
    space = _as_label_space(label_space)
    if model is None:
        model = choose_default()
    if not isinstance(model, (str, os.PathLike)):
        return _from_module(model, space, head)
    name = os.fspath(model)
    if name.startswith(HUB_PREFIX):
        return _from_hub(name, space, head)
    if (folder := _as_folder(model)) is not None:
        return _load_folder(folder, None, space, head)
    checkpoint = registry.resolve_checkpoint(name)
    if space is not None or head is not None:
        raise InvalidArgumentError(
            f"{name} states its own label space and head; leave out label_space and head, or load the module yourself."
        )
    return LoadedModel(
        name=checkpoint.name,
        module=load_pretrained(checkpoint),
        label_space=LabelSpace.load(checkpoint.label_space),
        head=checkpoint.head,
        data_config=checkpoint.data_config,
        owned=True,
    )


def choose_default() -> str:
    """The model that is used when none is named.

    The environment variable ``WN21K_MODEL``; else the 21K default if its weights are in the Hub's cache, or if one
    request of at most half a second shows that they can be downloaded; else the embedded ImageNet-1K model, with a
    :class:`FallbackModelWarning`.

    Raises:
        MissingExtraError: Neither the 21K default nor the embedded model is to be had.
    """
    if named := os.environ.get("WN21K_MODEL"):
        return named
    default = registry.get_checkpoint(DEFAULT_CHECKPOINT)
    if download.find_local(default) is not None or _default_is_reachable():
        return DEFAULT_CHECKPOINT
    return _embedded_instead("is neither cached nor reachable")


def create_model(
    name: str | os.PathLike[str],
    pretrained: bool = True,
    *,
    num_classes: int | None = None,
    features_only: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A network to fine-tune, to take features from, or to run; verified weights, on the CPU, in training mode.

    Args:
        name: A record's name, a timm name with a known label space, a folder, or ``hf-hub:ORG/NAME[@REVISION]``.
        pretrained: Load its weights.
        num_classes: Outputs of a new head, not pretrained; 0 for none. By default the published head stays.
        features_only: Return a list of feature maps [batch, channels, H, W], one per stage, in place of logits.
        cache_dir: Folder of the cache.
        **kwargs: As ``timm.create_model`` takes them: ``in_chans``, ``out_indices``, ``drop_rate``, ...

    Raises:
        UnknownModelError, UnresolvedLabelSpaceError, ModelError, MissingExtraError: As :func:`load_model`.
        InvalidArgumentError: The architecture does not take one of the arguments.
    """
    kwargs.update(num_classes=num_classes, features_only=features_only)
    folder = _as_folder(name)
    if folder is not None:
        return _build_from_folder(folder, _read_config(folder), _weights_in(folder), pretrained, **kwargs)
    if os.fspath(name).startswith(HUB_PREFIX):
        config, weights = fetch_from_hub(os.fspath(name), cache_dir)
        folder = config.path.parent
        return _build_from_folder(folder, _read_config(folder), weights.path, pretrained, **kwargs)
    return build_checkpoint(registry.resolve_checkpoint(os.fspath(name)), pretrained, cache_dir=cache_dir, **kwargs)


def build_checkpoint(
    checkpoint: Checkpoint,
    pretrained: bool,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The network of a checkpoint; ``overlay`` changes its pretrained configuration, as in timm.

    Raises:
        ModelError, MissingExtraError, InvalidArgumentError: As :func:`create_model`.
    """
    config = {**pretrained_config(checkpoint), **(overlay or {})}
    if pretrained and not any(config.get(key) for key in _OWN_WEIGHTS):
        path = download.fetch(checkpoint, cache_dir=cache_dir).path
        config.update(_weights(path, checkpoint if checkpoint in CHECKPOINTS else None))
    return _build(checkpoint.name, checkpoint.architecture, pretrained, config, **kwargs)


def pretrained_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """What timm calls a pretrained configuration, without a source of weights: we fetch them ourselves."""
    from timm.models import get_pretrained_cfg

    try:
        known = get_pretrained_cfg(checkpoint.name)
    except RuntimeError:  # timm has the architecture, but not these weights
        known = None
    if known is not None:
        config = known.to_dict(remove_source=True)
    elif checkpoint.architecture in ARCHITECTURES:
        config = dict(ofa.DEFAULT_CONFIG)
    else:  # timm's architecture, weights that it does not have: what belongs to the architecture
        default = get_pretrained_cfg(checkpoint.architecture).to_dict()
        config = {key: default[key] for key in _OF_ARCHITECTURE if key in default}
    _, _, tag = checkpoint.name.partition(".")
    config.update(checkpoint.data_config, architecture=checkpoint.architecture, tag=tag, custom_load=False)
    config.update(num_classes=len(LabelSpace.load(checkpoint.label_space)), label_offset=None)
    stated = {"license": checkpoint.license, "origin_url": checkpoint.origin}
    if checkpoint.paper and "arxiv.org/abs/" in checkpoint.paper:
        stated["paper_ids"] = f"arXiv:{checkpoint.paper.rpartition('/')[2]}"
    config.update({key: value for key, value in stated.items() if value is not None})
    return {key: value for key, value in config.items() if value is not None}


def load_pretrained(checkpoint: Checkpoint) -> nn.Module:
    """The network of a checkpoint with its weights, strictly loaded, on the CPU and in evaluation mode.

    Raises:
        ModelError, MissingExtraError: As :func:`load_model`.
    """
    return build_checkpoint(checkpoint, pretrained=True).eval()


def create_transform(name: str, training: bool = False) -> Any:
    """The preprocessing of a checkpoint: a transform from an RGB PIL image to a float32 tensor [3, H, W].

    Args:
        name: A record or a timm model with a known label space.
        training: timm's training transform (random resized crop, flip, colour jitter) with the checkpoint's size,
            interpolation, mean and std, in place of the one that predictions use.

    Raises:
        UnknownModelError, UnresolvedLabelSpaceError: As :func:`wn21k_zoo.registry.resolve_checkpoint`.
    """
    return build_transform(registry.resolve_checkpoint(name).data_config, training=training)


def build_transform(data_config: Mapping[str, Any], training: bool = False) -> Any:
    """The transform of a ``data_config`` as :class:`LoadedModel` has it."""
    import timm.data

    settings = dict(data_config)
    if training:
        settings.pop("crop_pct", None)
        settings.pop("crop_mode", None)
    return timm.data.create_transform(**settings, is_training=training)


def select_device(device: str | torch.device = "auto") -> torch.device:
    """A device by its name; 'auto' is CUDA, else Apple's MPS, else the CPU.

    Raises:
        InvalidArgumentError: torch does not know the device or this machine does not have it.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except Exception as error:
        raise InvalidArgumentError(
            f"The device {str(device)!r} cannot be used here; use auto, cpu, cuda, cuda:N or mps ({first_line(error)})"
        ) from error
    return chosen


@functools.cache
def _default_is_reachable() -> bool:
    return download.is_reachable(registry.get_checkpoint(DEFAULT_CHECKPOINT))


def _embedded_instead(why: str) -> str:
    embedded = registry.get_checkpoint(EMBEDDED_CHECKPOINT)
    if download.find_local(embedded) is None:
        raise MissingExtraError(
            f"The default model {DEFAULT_CHECKPOINT} {why}. Connect to the network, or use the embedded model, which",
            "embedded",
        )
    warnings.warn(
        f"{DEFAULT_CHECKPOINT} {why}; using {EMBEDDED_CHECKPOINT} (ImageNet-1K) instead. "
        "Choose a model by --model, model= or WN21K_MODEL.",
        FallbackModelWarning,
        stacklevel=4,
    )
    return EMBEDDED_CHECKPOINT


def _weights(path: Path, record: Checkpoint | None = None) -> dict[str, Any]:
    """How timm is told of a weight file: pickles are read by us, published layouts converted."""
    if record is not None and path.suffix != ".safetensors":
        return {"state_dict": convert.convert_file(path, record.architecture).state_dict}
    if path.suffix in (".pth", ".pt", ".bin", ".tar", ".pth.tar"):
        return {"state_dict": convert.read_state_dict(path)}
    return {"file": str(path)}


def _build(name: str, architecture: str, pretrained: bool, config: Mapping[str, Any], **kwargs: Any) -> nn.Module:
    try:
        module = convert.build(architecture, pretrained=pretrained, pretrained_cfg=dict(config), **kwargs)
    except TypeError as error:
        raise InvalidArgumentError(f"{name} cannot be built with these arguments: {first_line(error)}") from error
    except Exception as error:  # torch, safetensors and timm have many ways to say that a file does not fit
        what = "The weights do not fit, or it" if pretrained else "It"
        raise ModelError(f"{name} cannot be built. {what} does not do what was asked: {first_line(error)}") from error
    for key in _OWN_WEIGHTS:  # weights that are loaded need not be held a second time
        cast(Any, module).pretrained_cfg.pop(key, None)
        cast(Any, module).default_cfg.pop(key, None)
    return module


def fetch_from_hub(
    name: str, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[download.Fetched, download.Fetched]:
    """Configuration and weights of ``hf-hub:ORG/NAME[@REVISION]``, verified.

    Raises:
        UnknownModelError: That is no name of a repository.
        ModelError: They cannot be had; subclasses say why.
    """
    repo_id, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo_id):
        raise UnknownModelError(f"{name!r} is no Hub repository; write hf-hub:ORG/NAME.")
    source = HubSource(repo_id=repo_id, revision=revision or None)
    config = download.fetch_file(source, (CONFIG_FILE,), cache_dir=cache_dir)
    return config, download.fetch_file(source, WEIGHT_FILES, cache_dir=cache_dir)


def _from_hub(name: str, space: LabelSpace | None, head: Head | None) -> LoadedModel:
    config, weights = fetch_from_hub(name)
    return replace(_load_folder(config.path.parent, weights.path, space, head), name=name)


def _as_folder(name: str | os.PathLike[str]) -> Path | None:
    text = os.fspath(name)
    if text.startswith(HUB_PREFIX):
        return None
    if text.startswith(FOLDER_PREFIX) or isinstance(name, os.PathLike) or looks_like_path(text):
        folder = Path(text.removeprefix(FOLDER_PREFIX)).expanduser()
    elif Path(text).is_dir() and not _is_known(text):  # in the working directory, named without a slash
        folder = Path(text)
    else:
        return None
    if folder.is_file():
        raise UnknownModelError(f"{folder} is a file; name the folder that holds {CONFIG_FILE} and the weights.")
    if not folder.is_dir():
        raise UnknownModelError(f"There is no folder {folder}. For a repository on the Hub write hf-hub:ORG/NAME.")
    return folder


def _is_known(name: str) -> bool:
    try:
        registry.resolve_checkpoint(name)
    except UnknownModelError:
        return False
    except UnresolvedLabelSpaceError:
        return True
    return True


def _weights_in(folder: Path) -> Path:
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsNotFoundError(f"{folder} has no weights; one of {', '.join(WEIGHT_FILES)} must be there.")


def _build_from_folder(
    folder: Path, config: Mapping[str, Any], weights: Path, pretrained: bool = True, **kwargs: Any
) -> nn.Module:
    from timm.models._hub import load_model_config_from_path

    settings, architecture, arguments = load_model_config_from_path(folder)
    given = {key: value for key, value in kwargs.items() if value is not None}
    settings = {key: value for key, value in settings.items() if key not in ("source", "file")}
    settings.update(_weights(weights) if pretrained else {}, architecture=architecture)
    return _build(str(folder), architecture, pretrained, settings, **{**arguments, **given})


def _load_folder(folder: Path, weights: Path | None, space: LabelSpace | None, head: Head | None) -> LoadedModel:
    import timm

    config = _read_config(folder)
    weights = weights or _weights_in(folder)
    known = _checkpoint_of_config(config)
    if space is None:
        space = _label_space_of_config(config, known, folder)
    module = _build_from_folder(folder, config, weights).eval()
    _check_outputs(module, space, str(folder))
    return LoadedModel(
        name=str(folder),
        module=module,
        label_space=space,
        head=head or (known.head if known else "softmax"),
        data_config=_published_data_config(known, timm.data.resolve_model_data_config(module)),
        owned=True,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{folder} has no {CONFIG_FILE}; a folder as timm or the Hub writes it is needed.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict) or "architecture" not in config:
        raise ModelError(f"{folder / CONFIG_FILE} names no timm architecture.")
    settings = config.get("pretrained_cfg", {})
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / CONFIG_FILE}: pretrained_cfg is not an object.")
    for names in (config.get("label_names"), settings.get("label_names")):
        if names is not None and not isinstance(names, list):
            raise ModelError(f"{folder / CONFIG_FILE}: label_names is not a list.")
    return config


def _published_data_config(known: Checkpoint | None, own: Mapping[str, Any]) -> Mapping[str, Any]:
    """A model's own preprocessing; but timm's configurations of the 21K-P heads say crop where squash is right."""
    return known.data_config if known is not None and known.head == "semantic_softmax" else own


def _checkpoint_of_config(config: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint that a folder is a copy of, when its configuration names one and has as many classes."""
    settings = config.get("pretrained_cfg", config)
    try:
        checkpoint = registry.find_record(config["architecture"], settings["tag"]) or registry.resolve_checkpoint(
            f"{config['architecture']}.{settings['tag']}"
        )
    except (KeyError, UnknownModelError, UnresolvedLabelSpaceError):
        return None
    num_classes = config.get("num_classes", settings.get("num_classes"))
    return checkpoint if num_classes == len(LabelSpace.load(checkpoint.label_space)) else None


def _label_space_of_config(config: Mapping[str, Any], known: Checkpoint | None, folder: Path) -> LabelSpace:
    names = config.get("label_names") or config.get("pretrained_cfg", {}).get("label_names")
    if names:
        known_space = LabelSpace.load(known.label_space) if known else None
        if known_space is not None and tuple(names) == known_space.wnids:
            return known_space
        try:
            return LabelSpace(folder.name, tuple(names))
        except LookupError:
            known = None  # names of its own: not the classes of the checkpoint it was made from
    if known is None:
        raise UnresolvedLabelSpaceError(
            f"{folder} does not say which WordNet synsets its outputs are; give label_space (a name or wnids)."
        )
    return LabelSpace.load(known.label_space)


def _from_module(module: Any, space: LabelSpace | None, head: Head | None) -> LoadedModel:
    from timm.data import resolve_model_data_config
    from torch import nn

    if not isinstance(module, nn.Module):
        raise InvalidArgumentError(f"model is a {type(module).__name__}; give a name, a folder or a torch module.")
    if space is None:
        raise UnresolvedLabelSpaceError(
            "The classes of a module are not known by itself; give label_space (a name such as imagenet1k, or wnids)."
        )
    _check_outputs(module, space, type(module).__name__)
    settings = getattr(module, "pretrained_cfg", None)
    known = None
    if settings:
        config = {**settings, "num_classes": len(space)}
        known = _checkpoint_of_config({"architecture": settings.get("architecture"), "pretrained_cfg": config})
        if known is not None and LabelSpace.load(known.label_space).wnids != space.wnids:
            known = None
    return LoadedModel(
        name=type(module).__name__,
        module=module,
        label_space=space,
        head=head or (known.head if known else "softmax"),
        data_config=_published_data_config(known, resolve_model_data_config(module)) if settings else None,
        owned=False,
    )


def _check_outputs(module: nn.Module, space: LabelSpace, name: str) -> None:
    outputs = getattr(module, "num_classes", None)
    if isinstance(outputs, int) and outputs != len(space):
        raise LabelSpaceError(f"{name} has {outputs:,} outputs, but {space.name} has {len(space):,} classes.")


def _as_label_space(label_space: LabelSpaceLike | None) -> LabelSpace | None:
    if label_space is None or isinstance(label_space, LabelSpace):
        return label_space
    return LabelSpace.load(label_space) if isinstance(label_space, str) else LabelSpace("custom", tuple(label_space))


def looks_like_path(name: str) -> bool:
    separators = {"/", os.sep}
    return any(separator in name for separator in separators) or name in (".", "..") or name.startswith("~")
