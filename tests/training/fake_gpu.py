"""A fake GPU, whose tensors have no values, so that anything that would wait for a value fails.

There are two kinds: fake tensors on ``cuda``, which also tell devices apart but cannot run backward where torch finds
no GPU; and tensors on the device ``meta``, which can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["Traffic", "fake_gpu", "moved"]


class _NoTransfer(TorchDispatchMode):
    """Reject copies between devices, which make the host wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {each.device.type for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor)}
            assert len(devices) == 1, f"{func} from one device to the other"
        return result


class Traffic(TorchDispatchMode):
    """Adds up the ``bytes`` that operations read and write inside the context, on any device."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not (func.is_view or func is torch.ops.aten.detach.default):
            self.bytes += sum(each.nbytes for each in tree_leaves((args, kwargs, result)) if isinstance(each, Tensor))
        return result


@contextlib.contextmanager
def fake_gpu() -> Iterator[None]:
    """Inside, ``device="cuda"`` gives tensors with a device, shape and type but no values.

    These are errors: values that the host needs, as in ``if tensor.any()``; results whose size depends on values, as
    in ``tensor.nonzero()``; mixing tensors of two devices; and copies between devices.
    """
    with FakeTensorMode(allow_non_fake_inputs=False), _NoTransfer():
        yield


def moved(thing, device="cuda"):
    """Move all tensors of something to such a device, as if built there; objects change in place."""
    if isinstance(thing, Tensor):
        there = torch.empty(thing.shape, dtype=thing.dtype, device=device)
        return nn.Parameter(there, thing.requires_grad) if isinstance(thing, nn.Parameter) else there
    if isinstance(thing, (list, tuple)):
        return type(thing)(moved(each, device) for each in thing)
    if isinstance(thing, dict):
        for key in thing:
            thing[key] = moved(thing[key], device)
    elif isinstance(thing, nn.Module) or type(thing).__module__ == "wn21k_zoo.hierarchy":
        moved(getattr(thing, "__dict__", {}), device)
    return thing
