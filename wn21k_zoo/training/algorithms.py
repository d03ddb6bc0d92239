"""Process-wide torch settings that a run changes and restores; which precision suits a device."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["about_precision", "choose_algorithms", "is_deterministic", "torch_as_it_was"]

_MEMORY: Any = torch.utils.deterministic  # its attribute is not declared


@contextlib.contextmanager
def torch_as_it_was(device: torch.device) -> Iterator[None]:
    """Let a run change torch's process-wide settings and random state, and restore them afterwards."""
    before, benchmark = is_deterministic(), torch.backends.cudnn.benchmark
    fill = _MEMORY.fill_uninitialized_memory
    products = None
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a choice made through torch's newer settings stays
            products = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")  # TF32, as for torch's convolutions on CUDA
    devices, kind = ([], "cuda") if device.type == "cpu" else ([device], device.type)
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            torch.backends.cudnn.benchmark = benchmark
            _MEMORY.fill_uninitialized_memory = fill
            if products is not None:
                torch.set_float32_matmul_precision(products)
            _set_deterministic(*before)


def is_deterministic() -> tuple[bool, bool]:
    """Whether torch is deterministic, and whether it only warns instead of raising an error."""
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    return torch.are_deterministic_algorithms_enabled(), warns


def _set_deterministic(wanted: bool, warns: bool = False) -> None:
    if (wanted, warns) != is_deterministic():  # setting it takes seconds
        torch.use_deterministic_algorithms(wanted, warn_only=warns)


def choose_algorithms(deterministic: bool) -> None:
    """Let torch use only deterministic algorithms, or the fastest ones."""
    # Without it cuBLAS refuses to be deterministic; it is read once, so a run that is not may be followed by one.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    _set_deterministic(deterministic)
    _MEMORY.fill_uninitialized_memory = False  # costs time, and helps only layers that read garbage
    torch.backends.cudnn.benchmark = not deterministic  # all images have the same size


def about_precision(precision: str, device: torch.device) -> str:
    """Advise a precision that suits the device better; empty if there is none, or nothing is known about it."""
    if device.type == "cpu" and precision == "fp16":
        return "fp16 is slow on a CPU; --set run.precision=fp32 is faster"
    if device.type != "cuda":
        return ""
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and not has_bf16:
        return "this GPU has no native bf16; --set run.precision=fp16 is faster"
    if precision == "fp32":
        better = "bf16" if has_bf16 else "fp16"
        return f"fp32 takes more GPU time and memory than half precision: --set run.precision={better}"
    return ""
