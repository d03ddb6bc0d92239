"""Agreement between the ranks of a run: continue, write a checkpoint, stop, or fail because a loss is not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.signals import Signals

__all__ = ["Agreement", "Answer"]


class Answer(NamedTuple):
    """What at least one rank requested or observed.

    Attributes:
        stop: A rank was told to stop.
        save: A checkpoint is due.
        broken: A loss was not finite.
    """

    stop: bool
    save: bool
    broken: bool


class Agreement:
    """Asks all ranks within a step, before the backward pass, so that the answer arrives while that runs.

    While this process waits for the forward pass, the GPU still has the whole backward pass to do and never idles.

    Args:
        world: The processes of the run.
        signals: The signals that this process received.
    """

    def __init__(self, world: World, signals: Signals) -> None:
        self._world, self._signals = world, signals
        self._asked: tuple[Tensor, Any] = torch.zeros(3), None
        self._stream: torch.cuda.Stream | None = None

    def ask(self, loss: Tensor, save: bool) -> None:
        """Ask: all ranks call this with the loss of a step (a scalar) and whether they want a checkpoint."""
        wishes = torch.full_like(loss, self._signals.told), torch.full_like(loss, save)
        flags = torch.stack([*wishes, (~loss.isfinite()).to(loss.dtype)])
        work: Any = None
        if self._world.size > 1:
            work = torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, async_op=True)
        self._asked = (flags, work) if loss.device.type != "cuda" else self._copied(flags, work)

    def answer(self) -> Answer:
        """Return the answer of all ranks; waits for them, but on a GPU not for work queued after :meth:`ask`."""
        flags, done = self._asked
        if done is not None:
            done.synchronize() if isinstance(done, torch.cuda.Event) else done.wait()
        stop, save, broken = (bool(flag) for flag in flags.tolist())
        return Answer(stop, save, broken)

    def stops(self) -> bool:
        """Whether any rank was told to stop; all ranks must call this, and wait for each other."""
        return self._world.any(self._signals.told)

    def _copied(self, flags: Tensor, work: Any) -> tuple[Tensor, torch.cuda.Event]:
        """Copy the flags to host memory on a side stream; they are there once the returned event has occurred."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(flags.device)  # type: ignore[no-untyped-call]
        self._stream.wait_stream(torch.cuda.current_stream(flags.device))
        with torch.cuda.stream(self._stream):
            if work is not None:
                work.wait()
            host = torch.empty(3, pin_memory=True).copy_(flags, non_blocking=True)
        flags.record_stream(self._stream)
        done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call] # others keep a core busy
        return host, self._stream.record_event(done)
