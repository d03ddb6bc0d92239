"""Helpers to run a module: choosing a device, temporary evaluation mode, checking the shape of outputs."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from wn21k_zoo.errors import InvalidArgumentError, ModelError, first_line
from wn21k_zoo.labels import ClassNames, LabelSpace

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["check_logits", "device_of", "dtype_of", "evaluating", "memory_format", "select_device"]

# For each part of a module that is running: in how many threads, and whether it was in training mode before.
_RUNNING: dict[Any, list[Any]] = {}

_CHANGING = threading.Lock()


def select_device(device: str | torch.device = "auto") -> torch.device:
    """Select a device by its name; 'auto' is CUDA, else Apple's MPS, else the CPU.

    A GPU that is older than all those torch was built for does not count.

    Raises:
        InvalidArgumentError: torch does not know the device or this machine does not have it.
    """
    import torch

    if device == "auto":
        if torch.cuda.is_available() and not _is_too_old(torch.device("cuda")):
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except Exception as error:
        # torch's message lists all possible devices, or all that it was compiled for.
        known = str(device).partition(":")[0] in ("cpu", "cuda", "mps")
        why = f" ({first_line(error).partition('. ')[0][:160]})" if known else ""
        raise InvalidArgumentError(
            f"The device {str(device)!r} cannot be used here; use auto, cpu, cuda, cuda:N or mps{why}"
        ) from error
    if chosen.type == "cuda" and _is_too_old(chosen):
        raise InvalidArgumentError(
            f"{torch.cuda.get_device_name(chosen)} is older than the GPUs for which torch {torch.__version__} was "
            f"built ({', '.join(torch.cuda.get_arch_list())}); install a torch for it, or use cpu."
        )
    return chosen


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters, the CPU if it has none."""
    import torch

    return next((parameter.device for parameter in module.parameters()), torch.device("cpu"))


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of a module's floating-point parameters, None if it has none."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def memory_format(device: torch.device, channels_last: bool = True) -> torch.memory_format:
    """Memory format of weights and images; contiguous on MPS, where torch's batch norm gradients were wrong otherwise.

    https://github.com/pytorch/pytorch/issues/175189
    """
    import torch

    return torch.channels_last if channels_last and device.type != "mps" else torch.contiguous_format


def check_logits(logits: Any, images: int, classes: LabelSpace | ClassNames, name: str) -> None:
    """Check that outputs are one number for each image and class.

    Raises:
        ModelError: They are something else.
    """
    import torch

    found = f"outputs of shape {tuple(logits.shape)}" if isinstance(logits, torch.Tensor) else type(logits).__name__
    if not isinstance(logits, torch.Tensor) or tuple(logits.shape) != (images, len(classes)):
        raise ModelError(
            f"{name} gives {found} for {images} images; {classes.name} needs a tensor [{images}, {len(classes)}]."
        )


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Put a module into evaluation mode, and then restore the mode of each part: some may be frozen, some not.

    Threads may share a module, or parts of it: a part's mode is restored when the last thread is done with it.
    """
    parts = list(module.modules())
    with _CHANGING:
        for part in parts:
            _RUNNING.setdefault(part, [0, part.training])[0] += 1
    try:
        with _CHANGING, contextlib.suppress(NotImplementedError):  # torch.export's keep the mode of their export
            module.eval()
        yield
    finally:
        with _CHANGING:
            for part in parts:
                _RUNNING[part][0] -= 1
                if not _RUNNING[part][0]:
                    part.training = _RUNNING.pop(part)[1]


def _is_too_old(device: torch.device) -> bool:
    import torch

    built = [int(digits) for name in torch.cuda.get_arch_list() for digits in re.findall(r"^sm_(\d+)", name)]
    major, minor = torch.cuda.get_device_capability(device)
    return bool(built) and 10 * major + minor < min(built)  # empty if built for AMD
