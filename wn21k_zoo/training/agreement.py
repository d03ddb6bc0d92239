"""What the processes of a run do together: go on, write a checkpoint, stop, or end because a loss is not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.signals import Signals

__all__ = ["Agreement", "Answer"]


class Answer(NamedTuple):
    """What any rank wished or saw.

    Attributes:
        stop: One was told to stop.
        save: A checkpoint is due.
        broken: A loss was not finite.
        step: Of which step this is.
    """

    stop: bool
    save: bool
    broken: bool
    step: int


class Agreement:
    """Asks all ranks after a step, without waiting for a GPU.

    Args:
        world: The processes of the run.
        signals: What this one was told.
    """

    def __init__(self, world: World, signals: Signals) -> None:
        self._world, self._signals = world, signals
        self._pending: tuple[Tensor, Any, int] | None = None

    @property
    def told(self) -> bool:
        """Whether this process was told to stop."""
        return bool(self._signals.number)

    @property
    def code(self) -> int:
        """The exit code of a process that was told to stop."""
        return self._signals.code

    def ask(self, loss: Tensor, step: int, save: bool) -> Answer:
        """All ranks call it after a step with its loss, and whether they want a checkpoint.

        On a GPU the answer is that of the step before.
        """
        wishes = torch.tensor([self.told, save], dtype=torch.float32)
        flags = torch.cat([wishes.to(loss.device, non_blocking=True), (~loss.isfinite()).float()[None]])
        if self._world.size > 1:
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        if loss.device.type != "cuda":
            return _answer(flags, step)
        before = self.pending()
        host = torch.empty(3, pin_memory=True).copy_(flags, non_blocking=True)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        self._pending = host, event, step
        return before

    def pending(self) -> Answer:
        """The last answer, when it was not given yet; waits for it."""
        if self._pending is None:
            return Answer(False, False, False, 0)
        host, event, step = self._pending
        self._pending = None
        event.synchronize()
        return _answer(host, step)

    def stops(self) -> bool:
        """Whether any rank was told to stop; all ranks call it, and wait for each other."""
        return self._world.maximum(self.told)[0]


def _answer(flags: Tensor, step: int) -> Answer:
    stop, save, broken = (bool(flag) for flag in flags.tolist())
    return Answer(stop, save, broken, step)
