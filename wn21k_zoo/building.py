"""Build networks with verified weights from a record, a timm name, a folder or a Hub repository."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wn21k_zoo import convert, download, registry
from wn21k_zoo.architectures import ARCHITECTURES, ofa
from wn21k_zoo.checkpoints import CHECKPOINTS, WEIGHT_FILES, Checkpoint, HubSource
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
    "OF_ARCHITECTURE",
    "SOURCES",
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

# Keys of a pretrained configuration: weights given by hand, all sources of weights, what belongs to the architecture.
_OWN_WEIGHTS = ("state_dict", "file")
_PLACES = ("source", "url", "hf_hub_id", "hf_hub_filename")
SOURCES = (*_OWN_WEIGHTS, *_PLACES, "custom_load")
OF_ARCHITECTURE = ("first_conv", "classifier", "pool_size", "fixed_input_size", "min_input_size")


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
    """Create a network to fine-tune, extract features from or run; verified weights, on the CPU, in training mode.

    Args:
        name: A record's name, a timm name with a known label space, a folder, or ``hf-hub:ORG/NAME[@REVISION]``.
        pretrained: Load the weights. If False, a folder or repository needs no more than its configuration.
        num_classes: Outputs of a new, untrained head; 0 for no head. By default the published head is kept.
        features_only: Return a list of feature maps [batch, channels, H, W], one per stage, instead of logits.
        cache_dir: Cache folder.
        pretrained_cfg_overlay: Overrides for the model's pretrained configuration. Weights given here, as ``file`` or
            ``state_dict``, replace the published ones, which are then not fetched.
        **kwargs: As for ``timm.create_model``: ``in_chans``, ``out_indices``, ``drop_rate``, ... With
            ``checkpoint_path``, a file in timm's layout that must match exactly, no published weights are fetched.

    Raises:
        UnknownModelError, UnresolvedLabelSpaceError, ModelError, MissingExtraError: As
            :func:`wn21k_zoo.models.load_model`.
        InvalidArgumentError: The architecture does not accept one of the arguments.
    """
    kwargs.update(num_classes=num_classes, features_only=features_only)
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    overlay = pretrained_cfg_overlay or {}
    if {"pretrained_cfg", "overlay"} & set(kwargs) or not isinstance(overlay, Mapping):
        raise InvalidArgumentError(
            "The name selects the pretrained configuration; pass changes to it as pretrained_cfg_overlay=dict(...)."
        )
    if own := kwargs.get("checkpoint_path"):
        pretrained = False
        if not Path(own).is_file():
            raise WeightsNotFoundError(f"checkpoint_path: there is no file {own}.")
    folder = configured_folder(name, cache_dir)
    text = os.fspath(name)
    source = hub_source(text) if text.startswith(HUB_PREFIX) else None
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
    """Build the network of a checkpoint; ``overlay`` overrides its pretrained configuration, as in timm.

    Raises:
        ModelError, MissingExtraError, InvalidArgumentError: As :func:`create_model`.
    """
    config = {**pretrained_config(checkpoint), **_without_places(overlay, pretrained)}
    if pretrained and not _names_weights(config):
        path = download.fetch(checkpoint, cache_dir=cache_dir).path
        config.update(_weights(path, checkpoint if checkpoint in CHECKPOINTS else None))
    return _build(checkpoint.name, checkpoint.architecture, pretrained, config, **kwargs)


def pretrained_config(checkpoint: Checkpoint, num_classes: int | None = None) -> dict[str, Any]:
    """Make timm's pretrained configuration for a checkpoint, without a weight source: we fetch weights ourselves.

    The number of classes defaults to that of the checkpoint's label space.
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
    else:  # timm has the architecture but not the weights: take only what belongs to the architecture
        default = get_pretrained_cfg(checkpoint.architecture).to_dict()
        config = {key: default[key] for key in OF_ARCHITECTURE if key in default}
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
    """Return the folder that a name refers to, None if it names something else.

    Raises:
        UnknownModelError: It is empty, or looks like a folder, but there is none, or a file.
    """
    text = os.fspath(name)
    if text.startswith(HUB_PREFIX):
        return None
    if not text:
        raise UnknownModelError("The model name is empty; `wn21k list` shows some names.")
    if text.startswith(FOLDER_PREFIX) or isinstance(name, os.PathLike) or looks_like_path(text):
        folder = expanded(text.removeprefix(FOLDER_PREFIX), UnknownModelError)
    elif not registry.is_known(text) and expanded(text, UnknownModelError).exists():  # named without a slash
        folder = Path(text)
    else:
        return None
    if folder.is_file():
        how = ""
        if folder.suffix == ".pt":
            how = "; `wn21k train export RUN DIR` makes one from a run"
        elif folder.suffix in (".pth", ".bin", ".safetensors"):
            how = f"; `wn21k export {folder} DIR` makes one from the weight file of a record"
        raise UnknownModelError(f"{folder} is a file; name the folder that holds {CONFIG_FILE} and the weights{how}.")
    if not folder.is_dir():
        raise UnknownModelError(f"There is no folder {folder}. For a repository on the Hub write hf-hub:ORG/NAME.")
    return folder


def configured_folder(name: str | os.PathLike[str], cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Return the folder with the configuration of a folder or (fetched) Hub repository; None for any other name.

    Raises:
        InvalidArgumentError: It is neither a str nor a path.
        UnknownModelError: It is empty, or looks like a folder, but there is none, or a file.
        ModelError: The repository or its configuration cannot be fetched.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise InvalidArgumentError(f"{name!r:.60} is not a model's name; give a str or a pathlib.Path.")
    text = os.fspath(name)
    if text.startswith(HUB_PREFIX):
        return download.fetch_file(hub_source(text), (CONFIG_FILE,), cache_dir=cache_dir).path.parent
    return as_folder(name)


def weights_in(folder: Path) -> Path:
    """Return the weight file of a folder.

    Raises:
        WeightsNotFoundError: It has none.
    """
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise WeightsNotFoundError(f"{folder} has no weights; it must contain one of {', '.join(WEIGHT_FILES)}.")


def build_from_folder(
    folder: Path,
    weights: Path | None,
    /,
    pretrained: bool = True,
    *,
    overlay: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build the network that a folder's configuration describes; ``overlay`` overrides its pretrained configuration.

    The configuration is not trusted: it decides what is built, but not where weights come from.

    Raises:
        ModelError, InvalidArgumentError: It cannot be built, or the weights do not fit.
    """
    from timm.models._hub import _parse_model_cfg

    overlay = _without_places(overlay, pretrained)
    stated = {key: value for key, value in read_config(folder).items() if value is not None}  # as transformers does
    settings, architecture, arguments = _parse_model_cfg(stated, {})
    settings = {key: value for key, value in settings.items() if key not in SOURCES}
    arguments = {key: value for key, value in arguments.items() if key not in convert.OF_WEIGHTS}
    settings.update(_weights(weights) if weights is not None else {}, architecture=architecture)
    settings.update(overlay)
    try:
        return _build(str(folder), architecture, pretrained, settings, **{**arguments, **kwargs})
    except InvalidArgumentError as error:
        if kwargs:
            raise
        reason = first_line(error.__cause__ or error)
        raise ModelError(f"{folder / CONFIG_FILE} does not fit {architecture}: {reason}") from error


def about_run(folder: Path) -> str | None:
    """Say what to do with a run's folder where a model's folder is needed; None if it is not a run's folder."""
    if not is_run(folder):
        return None
    return f"is the folder of a run; `wn21k train export {folder} DIR` makes a model from it."


def read_config(folder: Path) -> dict[str, Any]:
    """Read a folder's configuration, as timm writes it; class names become ``label_names``, wherever they are stored.

    Raises:
        ModelError: It is missing or damaged.
    """
    try:
        config = parse_json((folder / CONFIG_FILE).read_bytes())
        json.dumps(config, ensure_ascii=False, allow_nan=False).encode()  # no NaN, infinity or half a character
    except FileNotFoundError as error:
        needed = f"has no {CONFIG_FILE}; give a folder as written by timm or the Hub."
        raise ModelError(f"{folder} {about_run(folder) or needed}") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / CONFIG_FILE} cannot be read: {first_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise ModelError(f"{folder / CONFIG_FILE} names no timm architecture.")
    settings = config.get("pretrained_cfg", {})
    for key, kind in (("pretrained_cfg", dict), ("model_args", dict | None)):
        if not isinstance(config.get(key, {}), kind):
            raise ModelError(f"{folder / CONFIG_FILE}: {key} is not an object.")
    size = settings_of(config).get("input_size", [3, 1, 1])
    if not isinstance(size, list) or len(size) != 3 or not all(type(each) is int and each > 0 for each in size):
        raise ModelError(f"{folder / CONFIG_FILE}: input_size is not three numbers, of channels, height and width.")
    for key, place in (("label_names", config), ("label_names", settings), ("labels", config)):  # timm's old name
        given = names = place.get(key)
        if isinstance(given, dict) and set(given) == {str(index) for index in range(len(given))}:
            names = [given[str(index)] for index in range(len(given))]
        if isinstance(names, list) and names:
            return {**config, "label_names": names}
        if names and key == "label_names":
            raise ModelError(
                f"{folder / CONFIG_FILE}: label_names is not a list, nor does it have a name for each index."
            )
    return config


def settings_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The pretrained configuration in the result of :func:`read_config`; timm's old files contain nothing else."""
    return config.get("pretrained_cfg") or config


def _without_places(overlay: Mapping[str, Any] | None, pretrained: bool) -> dict[str, Any]:
    """Overrides of a pretrained configuration, without places that timm would fetch weights from itself."""
    overlay = overlay or {}
    place = next((key for key in _PLACES if overlay.get(key)), None)
    if place and pretrained and not _names_weights(overlay):
        raise InvalidArgumentError(
            f"pretrained_cfg_overlay has {place!r}, but weights come from the model's own sources; for others give "
            "file or state_dict, or hf-hub:ORG/NAME as the model."
        )
    file = overlay.get("file")
    if file and pretrained and not overlay.get("state_dict") and not Path(str(file)).is_file():
        raise WeightsNotFoundError(f"pretrained_cfg_overlay: there is no file {file}.")
    return {key: value for key, value in overlay.items() if key not in _PLACES}


def _names_weights(config: Mapping[str, Any]) -> bool:
    return any(config.get(key) for key in _OWN_WEIGHTS)


def _weights(path: Path, record: Checkpoint | None = None) -> dict[str, Any]:
    """Configuration entries that give timm a weight file: we read pickles ourselves and convert published layouts."""
    if record is not None and path.suffix != ".safetensors":
        return {"state_dict": convert.convert_file(path, record.architecture).state_dict}
    if path.suffix in (".pth", ".pt", ".bin", ".tar"):
        return {"state_dict": convert.read_state_dict(path)}
    return {"file": str(path)}


def _build(name: str, architecture: str, pretrained: bool, config: Mapping[str, Any], /, **kwargs: Any) -> nn.Module:
    from safetensors import SafetensorError

    try:
        module = convert.build(architecture, pretrained=pretrained, pretrained_cfg=dict(config), **kwargs)
    except Wn21kError:
        raise
    except TypeError as error:
        raise InvalidArgumentError(f"{name} cannot be built with these arguments: {first_line(error)}") from error
    except SafetensorError as error:
        raise ModelError(
            f"The weights of {name} are damaged or incomplete ({first_line(error)}); copy them again."
        ) from error
    except Exception as error:  # torch and timm raise many kinds of errors for a file that does not fit
        what = "The weights do not fit, or it" if pretrained or kwargs.get("checkpoint_path") else "It"
        raise ModelError(
            f"{name} cannot be built. {what} does not support what was asked for: {first_line(error)}"
        ) from error
    for key in _OWN_WEIGHTS:  # do not keep a second copy of the loaded weights
        cast(Any, module).pretrained_cfg.pop(key, None)
        cast(Any, module).default_cfg.pop(key, None)
    return module


def fetch_from_hub(name: str, cache_dir: str | os.PathLike[str] | None = None) -> tuple[Fetched, Fetched]:
    """Fetch configuration and weights of ``hf-hub:ORG/NAME[@REVISION]``, verified.

    Raises:
        UnknownModelError: That is not a repository name.
        ModelError: They cannot be fetched; subclasses say why.
    """
    source = hub_source(name)
    config = download.fetch_file(source, (CONFIG_FILE,), cache_dir=cache_dir)
    return config, download.fetch_file(source, WEIGHT_FILES, cache_dir=cache_dir)


def hub_source(name: str) -> HubSource:
    """Return the repository and files that ``hf-hub:ORG/NAME[@REVISION]`` refers to.

    Raises:
        UnknownModelError: That is not a repository name.
    """
    repo_id, _, revision = name.removeprefix(HUB_PREFIX).partition("@")
    if not is_repo_id(repo_id):
        raise UnknownModelError(f"{name!r} is not a Hub repository name; write hf-hub:ORG/NAME.")
    return HubSource(repo_id=repo_id, filenames=(CONFIG_FILE, *WEIGHT_FILES), revision=revision or None)


def is_repo_id(text: str) -> bool:
    """Whether a text is a valid ORG/NAME on the Hub."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def looks_like_path(name: str) -> bool:
    """Whether a name is written like a path: it has a slash, is ``.`` or ``..``, or starts with ``~``."""
    return "/" in name or os.sep in name or name in (".", "..") or name.startswith("~")
