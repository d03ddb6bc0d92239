"""Convert published weight files to timm's layout: the authors' files, timm's releases, what timm writes today.

A layout is recognised by the names and shapes of its entries, never by the file name. No code in a pickle is executed:
it is read with ``torch.load(weights_only=True)``, and only a flat dict of tensors is accepted.
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wn21k_zoo.architectures import ARCHITECTURES
from wn21k_zoo.architectures.ofa import STAGE_DEPTHS
from wn21k_zoo.checkpoints import CHECKPOINTS
from wn21k_zoo.errors import ConversionError, UnknownModelError, Wn21kError, did_you_mean, first_line
from wn21k_zoo.files import expanded, refuse_compressed, replace
from wn21k_zoo.registry import TIMM_PREFIX

if TYPE_CHECKING:
    import torch
    from torch import nn

    StateDict = dict[str, torch.Tensor]

__all__ = [
    "OF_WEIGHTS",
    "Converted",
    "build",
    "check_architecture",
    "convert_file",
    "convert_state_dict",
    "read_state_dict",
    "save_safetensors",
    "write_safetensors",
]

# Keys under which a file may wrap its state dict, and the prefix that distributed training puts before each name.
_WRAPPERS = ("state_dict", "model")
_PREFIX = "module."
# The original activated batch normalisation scales by |weight| + eps (Rota Bulo et al. 2018, section 4.1).
_ABN_EPS = 1e-5
_SHOWN = 5
# Arguments of timm.create_model that say where weights come from or go to, not what is built. Files written by others
# may describe a network, but must not cause anything else to be fetched, read or written.
OF_WEIGHTS = ("cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay",
    "pretrained_filter_fn", "pretrained_model_args", "pretrained_strict")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Converted:
    """A checkpoint in timm's layout.

    Attributes:
        architecture: Its name, ours or timm's.
        num_classes: Number of outputs of its head.
        state_dict: Entries that ``load_state_dict(strict=True)`` of that architecture accepts; contiguous.
    """

    architecture: str
    num_classes: int
    state_dict: StateDict


def build(architecture: str, /, **kwargs: Any) -> nn.Module:
    """Build a network of one of our architectures or timm's; arguments as for ``timm.create_model``.

    Raises:
        UnknownModelError: There is no such architecture; names of folders and repositories are not accepted.
    """
    import timm

    check_architecture(architecture)
    own = ARCHITECTURES.get(architecture.removeprefix(TIMM_PREFIX))
    if own is None:
        return cast("nn.Module", timm.create_model(architecture, **kwargs))
    # Arguments that timm.create_model does not pass on to the architecture.
    given = {name: value for name, value in kwargs.items() if value is not None}
    checkpoint_path = given.pop("checkpoint_path", None)
    layers = {name: given.pop(name) for name in ("scriptable", "exportable", "no_jit") if name in given}
    with timm.layers.set_layer_config(**layers):
        module = own(**given)
    if checkpoint_path:
        timm.models.load_checkpoint(module, checkpoint_path)
    # What timm writes into the configurations that it saves: it knows our architectures by our prefix.
    module.pretrained_cfg["architecture"] = f"{TIMM_PREFIX}{architecture.removeprefix(TIMM_PREFIX)}"
    return cast("nn.Module", module)


def check_architecture(name: str, error: type[Wn21kError] = UnknownModelError) -> None:
    """Check that timm or this package has an architecture.

    Raises:
        UnknownModelError, or ``error``: Neither has it; the message gives the nearest names.
    """
    import timm

    if name.removeprefix(TIMM_PREFIX) not in ARCHITECTURES and not timm.is_model(name):
        near = did_you_mean(name, [*ARCHITECTURES, *timm.list_models()])
        raise error(f"There is no architecture {name!r}.{near}")


def convert_file(path: str | os.PathLike[str], architecture: str | None = None) -> Converted:
    """Convert a published ``.pth``, ``.bin`` or ``.safetensors`` file.

    Args:
        path: The file.
        architecture: Its architecture, needed where several share a layout; recognised by default.

    Raises:
        ConversionError: It cannot be read, is not a plain state dict, or its entries are not those of the architecture.
        UnknownModelError: No record has that architecture.
    """
    return convert_state_dict(read_state_dict(path), architecture)


_EXPANDED = 1 << 26  # bytes that a tensor may have beyond those in the file, by repeating them


def read_state_dict(path: str | os.PathLike[str]) -> StateDict:
    """Read the tensors of a weight file onto the CPU, unwrapped from ``state_dict`` or ``model``; runs no pickled code.

    Raises:
        ConversionError: It cannot be read, or is not a flat dict of tensors.
    """
    import safetensors.torch
    import torch

    path = expanded(path, ConversionError)
    if not path.is_file():
        raise ConversionError(f"{path} is {'a folder' if path.is_dir() else 'not there'}; name a weight file.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        refuse_compressed(path)
        with warnings.catch_warnings(action="ignore"):  # about old file formats
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zipfile and safetensors raise many kinds of errors
        kind = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        raise ConversionError(
            f"{path} was not loaded, and nothing in it was executed: it is not a plain state dict "
            f"({f'it contains {kind[1]}' if kind else first_line(error)[:160]})"
        ) from error
    for wrapper in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{path} holds a {type(content).__name__}, not a state dict.")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise ConversionError(f"{path}: the entry {key!r:.100} is a {type(value).__name__}, not a named tensor.")
        if not _is_plain(value):
            raise ConversionError(f"{path}: the entry {key!r:.100} is no plain tensor of numbers that are in the file.")
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in content.values()}
    if sum(storages.values()) > path.stat().st_size:  # torch may leave what it does not find uninitialised
        raise ConversionError(f"{path} claims more numbers than are in it; fetch it again.")
    return dict(content)


def _is_plain(value: torch.Tensor) -> bool:
    import torch

    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.device.type != "cpu":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes() + _EXPANDED


def convert_state_dict(state_dict: Mapping[str, torch.Tensor], architecture: str | None = None) -> Converted:
    """As :func:`convert_file`, from tensors in memory."""
    known = dict.fromkeys(checkpoint.architecture for checkpoint in CHECKPOINTS)
    if architecture is not None and architecture not in known:
        raise UnknownModelError(f"No record has the architecture {architecture!r}.{did_you_mean(architecture, known)}")
    found = {key.removeprefix(_PREFIX): value for key, value in state_dict.items()}
    for marks, rename in _LAYOUTS:
        if marks & found.keys():
            found = rename(found)
            break
    fits = {}
    differences: dict[str, tuple[int, str]] = {}
    for name in [architecture] if architecture else known:
        completed, difference = _fit(found, name)
        if completed is not None:
            fits[name] = completed
        else:
            differences[name] = difference
    if len(fits) > 1:
        raise ConversionError(f"These entries fit {', '.join(fits)}; choose one with --architecture (architecture=).")
    if not fits:
        nearest = min(differences, key=lambda name: differences[name][0])
        raise ConversionError(f"The entries are not those of {nearest}: {differences[nearest][1]}")
    name, completed = fits.popitem()
    return Converted(architecture=name, num_classes=len(completed[f"{_classifier(name)}.weight"]), state_dict=completed)


def save_safetensors(converted: Converted, path: str | os.PathLike[str]) -> None:
    """Write a safetensors file; it appears at ``path`` only once it is complete.

    Raises:
        ConversionError: It cannot be written.
    """
    metadata = {"architecture": converted.architecture, "num_classes": str(converted.num_classes)}
    try:
        write_safetensors(converted.state_dict, Path(path), **metadata)
    except OSError as error:
        raise ConversionError(f"{path} cannot be written ({first_line(error)}); choose another place.") from error


def write_safetensors(state: StateDict, path: Path, **metadata: str) -> None:
    """Write tensors, which may share memory, to a file that appears at ``path`` only once it is complete.

    Raises:
        OSError: It cannot be written.
    """
    import safetensors.torch

    own: StateDict = {}
    seen: set[int] = set()
    for name, value in state.items():
        own[name] = value.contiguous()
        if (place := own[name].untyped_storage().data_ptr()) in seen:
            own[name] = own[name].clone()  # the format does not allow tensors that share memory
        seen.add(place)
    path = Path(os.path.realpath(path))  # not atomic_file: save_file wants a path, and makes no copy of it all
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        safetensors.torch.save_file(own, temporary, {"format": "pt", **metadata})
        temporary.chmod(mode)  # save_file makes files that nobody else may read
        replace(temporary, path)
    except safetensors.SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _fit(found: StateDict, architecture: str) -> tuple[StateDict | None, tuple[int, str]]:
    """Return the complete entries in the architecture's order, or how many differ and which."""
    import torch

    expected = {key: tuple(value.shape) for key, value in _skeleton(architecture).state_dict().items()}
    head = [key for key in expected if key.startswith(_classifier(architecture))]  # for any one number of classes
    outputs = next((tuple(found[key].shape[:1]) for key in head if key in found), ())
    expected.update({key: (*outputs, *expected[key][1:]) for key in head})
    counters = {key for key in expected if key.endswith("num_batches_tracked")}
    missing = [key for key in expected if key not in found and key not in counters]
    unknown = [key for key in found if key not in expected]
    wrong = [key for key, value in found.items() if key in expected and tuple(value.shape) != expected[key]]
    if not (missing or unknown or wrong):
        zero = torch.zeros((), dtype=torch.int64)
        return {key: found.get(key, zero).contiguous().clone() for key in expected}, (0, "")
    parts = []
    for what, keys in (("missing", missing), ("unknown", unknown), ("of another shape", wrong)):
        if keys:
            more = f" and {len(keys) - _SHOWN:,} more" if len(keys) > _SHOWN else ""
            parts.append(f"{what} {', '.join(keys[:_SHOWN])}{more}")
    return None, (len(missing) + len(unknown) + len(wrong), "; ".join(parts) + ".")


@functools.cache
def _skeleton(architecture: str) -> nn.Module:
    import torch

    with torch.device("meta"):
        return build(architecture)


def _classifier(architecture: str) -> str:
    return str(cast(Any, _skeleton(architecture)).pretrained_cfg["classifier"])


def _modules(
    block: str, depths: Sequence[int], outside: Mapping[str, str], first: Mapping[str, str], later: Mapping[str, str]
) -> dict[str, str]:
    """Each module's name in timm's layout, which numbers blocks within stages; the first block has no expansion."""
    found = dict(outside)
    places = [f"blocks.{stage}.{index}" for stage, depth in enumerate(depths) for index in range(depth)]
    for number, place in enumerate(places):
        names = later if number else first
        found |= {f"{block.format(number)}.{old}": f"{place}.{new}" for old, new in names.items()}
    return found


def _renamed(key: str, modules: Mapping[str, str]) -> str:
    """The name in timm's layout; an unknown one stays as it is."""
    module, _, entry = key.rpartition(".")
    return f"{modules[module]}.{entry}" if module in modules else key


_OFA_MODULES = _modules(
    block="blocks.{}.mobile_inverted_conv",
    depths=STAGE_DEPTHS[:-1],
    outside={
        "first_conv.conv": "conv_stem",
        "first_conv.bn": "bn1",
        "final_expand_layer.conv": "blocks.6.0.conv",
        "final_expand_layer.bn": "blocks.6.0.bn1",
        "feature_mix_layer.conv": "conv_head",
        "classifier.linear": "classifier",
    },
    first={
        "depth_conv.conv": "conv_dw",
        "depth_conv.bn": "bn1",
        "point_linear.conv": "conv_pw",
        "point_linear.bn": "bn2",
    },
    later={
        "inverted_bottleneck.conv": "conv_pw",
        "inverted_bottleneck.bn": "bn1",
        "depth_conv.conv": "conv_dw",
        "depth_conv.bn": "bn2",
        "depth_conv.se.fc.reduce": "se.conv_reduce",
        "depth_conv.se.fc.expand": "se.conv_expand",
        "point_linear.conv": "conv_pwl",
        "point_linear.bn": "bn3",
    },
)
_EFFICIENTNET_MODULES = _modules(
    block="_blocks.{}",
    depths=(1, 2, 2, 3, 3, 4, 1),
    outside={
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    },
    first={"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"},
    later={
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    },
)


def _from_authors_ofa(found: StateDict) -> StateDict:
    renamed = {_renamed(key, _OFA_MODULES): value for key, value in found.items()}
    head = renamed.get("classifier.weight")
    if head is not None and head.ndim == 4:  # a 1 x 1 convolution after pooling
        renamed["classifier.weight"] = head.flatten(1)
    return renamed


def _from_efficientnet(found: StateDict) -> StateDict:
    return {_renamed(key, _EFFICIENTNET_MODULES): value for key, value in found.items()}


def _from_authors_tresnet(found: StateDict) -> StateDict:
    converted = {}
    for key, value in found.items():
        name = re.sub(r"(conv\d+|downsample\.\d+)\.0(?:\.0)?\.(weight|bias)$", r"\1.conv.\2", key)
        name = re.sub(r"(conv\d+|downsample\.\d+)(?:\.0)?\.1\.(\w+)$", r"\1.bn.\2", name)
        if name.endswith("bn.weight"):
            value = value.abs() + _ABN_EPS
        converted[name] = value
    return converted


_LAYOUTS: tuple[tuple[set[str], Callable[[StateDict], StateDict]], ...] = (  # any of the entries identifies it
    ({"first_conv.conv.weight"}, _from_authors_ofa),
    ({"_conv_stem.weight"}, _from_efficientnet),
    ({"body.conv1.0.weight", "body.conv1.0.0.weight"}, _from_authors_tresnet),
)
