"""Networks with verified weights: from a record, a timm name, a folder, or a repository on the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wn21k_zoo import convert, download, registry
from wn21k_zoo.architectures import ARCHITECTURES, ofa
from wn21k_zoo.checkpoints import CHECKPOINTS, Checkpoint, HubSource
from wn21k_zoo.errors import (
    InvalidArgumentError,
    ModelError,
    UnknownModelError,
    WeightsNotFoundError,
    Wn21kError,
    first_line,
)
from wn21k_zoo.files import expanded, is_run, parse_json
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.on_disk import Fetched

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "CONFIG_FILE",
    "FOLDER_PREFIX",
    "HUB_PREFIX",
    "WEIGHT_FILES",
    "about_run",
    "as_folder",
    "build_checkpoint",
    "build_from_folder",
    "configured_folder",
    "create_model",
    "fetch_from_hub",
    "hub_source",
    "is_repo_id",
    "looks_like_path",
    "pretrained_config",
    "read_config",
    "settings_of",
    "weights_in",
]

HUB_PREFIX = "hf-hub:"
FOLDER_PREFIX = "local-dir:"
CONFIG_FILE = "config.json"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# Of a pretrained configuration: where weights come from by hand, or else, and what belongs to the architecture.
_OWN_WEIGHTS = ("state_dict", "file")
_SOURCES = (*_OWN_WEIGHTS, "source", "url", "hf_hub_id", "hf_hub_filename", "custom_load")
_OF_ARCHITECTURE = ("first_conv", "classifier", "pool_size", "fixed_input_size", "min_input_size")


def create_model(
    name: str | os.PathLike[str],
    pretrained: bool = True,
    *,
    num_classes: int | None = None,
    features_only: bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """A network to fine-tune, to take features from, or to run; verified weights, on the CPU, in training mode.

    Args:
        name: A record's name, a timm name with a known label space, a folder, or ``hf-hub:ORG/NAME[@REVISION]``.
        pretrained: Load its weights. Without them no more than a folder's or a repository's configuration is needed.
        num_classes: Outputs of a new head, not pretrained; 0 for none. By default the published head stays.
        features_only: Return a list of feature maps [batch, channels, H, W], one per stage, in place of logits.
        cache_dir: Folder of the cache.
        pretrained_cfg_overlay: What is to differ from its own pretrained configuration. Weights that it names, as
            ``file`` or ``state_dict``, take the place of the published ones, which are then not fetched.
        **kwargs: As ``timm.create_model`` takes them: ``in_chans``, ``out_indices``, ``drop_rate``, ... With
            ``checkpoint_path``, a file in timm's layout that must fit as it is, no published weights are fetched.

    Raises:
        UnknownModelError, UnresolvedLabelSpaceError, ModelError, MissingExtraError: As
            :func:`wn21k_zoo.models.load_model`.
        InvalidArgumentError: The architecture does not take one of the arguments.
    """
    kwargs.update(num_classes=num_classes, features_only=features_only)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    overlay = pretrained_cfg_overlay or {}
    if {"pretrained_cfg", "overlay"} & set(kwargs) or not isinstance(overlay, Mapping):
        raise InvalidArgumentError(
            "The name says which pretrained configuration; give what is to differ as pretrained_cfg_overlay=dict(...)."
        )
    if own := kwargs.get("checkpoint_path"):
        pretrained = False
        if not Path(own).is_file():
            raise WeightsNotFoundError(f"There is no file {own}, which checkpoint_path names.")
    text = os.fspath(name)
    source = hub_source(text) if text.startswith(HUB_PREFIX) else None
    folder = configured_folder(name, cache_dir)
    if folder is None:
        checkpoint = registry.resolve_checkpoint(text)
        return build_checkpoint(checkpoint, pretrained, cache_dir=cache_dir, overlay=overlay, **kwargs)
    read_config(folder)
    weights = None
    if pretrained and not _names_weights(overlay):
        weights = download.fetch_file(source, WEIGHT_FILES, cache_dir=cache_dir).path if source else weights_in(folder)
    return build_from_folder(folder, weights, pretrained, overlay=overlay, **kwargs)


def build_checkpoint(
    checkpoint: Checkpoint,
    /,
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
    if pretrained and not _names_weights(config):
        path = download.fetch(checkpoint, cache_dir=cache_dir).path
        config.update(_weights(path, checkpoint if checkpoint in CHECKPOINTS else None))
    return _build(checkpoint.name, checkpoint.architecture, pretrained, config, **kwargs)


def pretrained_config(checkpoint: Checkpoint, num_classes: int | None = None) -> dict[str, Any]:
    """What timm calls a pretrained configuration, without a source of weights: we fetch them ourselves.

    The number of classes is by default that of the checkpoint's label space.
    """
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
    num_classes = num_classes or len(LabelSpace.load(checkpoint.label_space))
    config.update(num_classes=num_classes, label_offset=None)
    stated = {"license": checkpoint.license, "origin_url": checkpoint.origin}
    if checkpoint.paper and "arxiv.org/abs/" in checkpoint.paper:
        stated["paper_ids"] = f"arXiv:{checkpoint.paper.rpartition('/')[2]}"
    config.update({key: value for key, value in stated.items() if value is not None})
    return {key: value for key, value in config.items() if value is not None}


def as_folder(name: str | os.PathLike[str]) -> Path | None:
    """The folder that a name means, None when it is the name of something else.

    Raises:
        UnknownModelError: It looks like a folder, and there is none.
    """
    text = os.fspath(name)
    if text.startswith(HUB_PREFIX):
        return None
    if not text:
        raise UnknownModelError("The name of the model is empty; `wn21k list` shows some.")
    if text.startswith(FOLDER_PREFIX) or isinstance(name, os.PathLike) or looks_like_path(text):
        folder = expanded(text.removeprefix(FOLDER_PREFIX), UnknownModelError)
    elif Path(text).is_dir() and not registry.is_known(text):  # in the working directory, named without a slash
        folder = Path(text)
    else:
        return None
    if folder.is_file():
        how = "; `wn21k train export RUN DIR` makes one of a run" if folder.suffix == ".pt" else ""
        raise UnknownModelError(f"{folder} is a file; name the folder that holds {CONFIG_FILE} and the weights{how}.")
    if not folder.is_dir():
        raise UnknownModelError(f"There is no folder {folder}. For a repository on the Hub write hf-hub:ORG/NAME.")
    return folder


def configured_folder(name: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """The folder with the configuration of what is a folder or, fetched, a Hub repository; None for any other name.

    Raises:
        UnknownModelError: It looks like a folder, and there is none.
        ModelError: The repository, or its configuration, cannot be had.
    """
    text = os.fspath(name)
    if text.startswith(HUB_PREFIX):
        return download.fetch_file(hub_source(text), (CONFIG_FILE,), cache_dir=cache_dir).path.parent
    return as_folder(name)


def weights_in(folder: Path) -> Path:
    """The weight file of a folder.

    Raises:
        WeightsNotFoundError: It has none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsNotFoundError(f"{folder} has no weights; one of {', '.join(WEIGHT_FILES)} must be there.")


def build_from_folder(
    folder: Path,
    weights: Path | None,
    /,
    pretrained: bool = True,
    *,
    overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The network that a folder's configuration describes; ``overlay`` changes its pretrained configuration.

    The configuration, which anybody may have written, says what is built; where weights come from, it does not.

    Raises:
        ModelError, InvalidArgumentError: It cannot be built, or the weights do not fit.
    """
    from timm.models._hub import _parse_model_cfg

    stated = {key: value for key, value in read_config(folder).items() if value is not None}  # as transformers has it
    settings, architecture, arguments = _parse_model_cfg(stated, {})
    settings = {key: value for key, value in settings.items() if key not in _SOURCES}
    arguments = {key: value for key, value in arguments.items() if not convert.names_weights(key)}
    settings.update(_weights(weights) if weights is not None else {}, architecture=architecture)
    settings.update(overlay or {})
    try:
        return _build(str(folder), architecture, pretrained, settings, **{**arguments, **kwargs})
    except InvalidArgumentError as error:
        if kwargs:
            raise
        reason = first_line(error.__cause__ or error)
        raise ModelError(f"{folder / CONFIG_FILE} does not fit {architecture}: {reason}") from error


def about_run(folder: Path) -> str | None:
    """What to do with the folder of a run where one with a model is needed; None when it is not that of a run."""
    if not is_run(folder):
        return None
    return f"is the folder of a run; `wn21k train export {folder} DIR` makes a model of it."


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration of a folder, as timm writes it; names of classes are its ``label_names``, wherever it has them.

    Raises:
        ModelError: It has none, or a damaged one.
    """
    try:
        config = parse_json((folder / CONFIG_FILE).read_bytes())
    except FileNotFoundError as error:
        needed = f"has no {CONFIG_FILE}; a folder as timm or the Hub writes it is needed."
        raise ModelError(f"{folder} {about_run(folder) or needed}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ModelError(f"{folder / CONFIG_FILE} names no timm architecture.")
    settings = config.get("pretrained_cfg", {})
    if not isinstance(settings, dict):
        raise ModelError(f"{folder / CONFIG_FILE}: pretrained_cfg is not an object.")
    for key, place in (("label_names", config), ("label_names", settings), ("labels", config)):  # timm's former name
        given = names = place.get(key)
        if isinstance(given, dict) and set(given) == {str(index) for index in range(len(given))}:
            names = [given[str(index)] for index in range(len(given))]
        if isinstance(names, list) and names:
            return {**config, "label_names": names}
        if names and key == "label_names":
            raise ModelError(f"{folder / CONFIG_FILE}: label_names is not a list, nor has a name for each index.")
    return config


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The pretrained configuration in what :func:`read_config` gives; timm's former files are nothing else."""
    return config.get("pretrained_cfg") or config


def _names_weights(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in _OWN_WEIGHTS)


def _weights(path: Path, record: Checkpoint | None = None) -> dict[str, Any]:
    """How timm is told of a weight file: pickles are read by us, published layouts converted."""
    if record is not None and path.suffix != ".safetensors":
        return {"state_dict": convert.convert_file(path, record.architecture).state_dict}
    if path.suffix in (".pth", ".pt", ".bin", ".tar"):
        return {"state_dict": convert.read_state_dict(path)}
    return {"file": str(path)}


def _build(name: str, architecture: str, pretrained: bool, config: Mapping[str, Any], /, **kwargs: Any) -> nn.Module:
    try:
        module = convert.build(architecture, pretrained=pretrained, pretrained_cfg=dict(config), **kwargs)
    except Wn21kError:
        raise
    except TypeError as error:
        raise InvalidArgumentError(f"{name} cannot be built with these arguments: {first_line(error)}") from error
    except Exception as error:  # torch, safetensors and timm have many ways to say that a file does not fit
        what = "The weights do not fit, or it" if pretrained or kwargs.get("checkpoint_path") else "It"
        raise ModelError(f"{name} cannot be built. {what} does not do what was asked: {first_line(error)}") from error
    for key in _OWN_WEIGHTS:  # weights that are loaded need not be held a second time
        cast(Any, module).pretrained_cfg.pop(key, None)
        cast(Any, module).default_cfg.pop(key, None)
    return module


def fetch_from_hub(name: str, cache_dir: str | os.PathLike[str] | None = None) -> tuple[Fetched, Fetched]:
    """Configuration and weights of ``hf-hub:ORG/NAME[@REVISION]``, verified.

    Raises:
        UnknownModelError: That is no name of a repository.
        ModelError: They cannot be had; subclasses say why.
    """
    source = hub_source(name)
    config = download.fetch_file(source, (CONFIG_FILE,), cache_dir=cache_dir)
    return config, download.fetch_file(source, WEIGHT_FILES, cache_dir=cache_dir)


def hub_source(name: str) -> HubSource:
    """The repository and the files that ``hf-hub:ORG/NAME[@REVISION]`` means.

    Raises:
        UnknownModelError: That is no name of a repository.
    """
    repo_id, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if not is_repo_id(repo_id):
        raise UnknownModelError(f"{name!r} is no Hub repository; write hf-hub:ORG/NAME.")
    return HubSource(repo_id=repo_id, filenames=(CONFIG_FILE, *WEIGHT_FILES), revision=revision or None)


def is_repo_id(text: str) -> bool:
    """Whether a text can be ORG/NAME on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def looks_like_path(name: str) -> bool:
    """Whether a text is written like a path: with a slash, ``.``, ``..`` or ``~``."""
    return "/" in name or os.sep in name or name in (".", "..") or name.startswith("~")
