"""Evaluation mode for a while, also of modules that threads share."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

__all__ = ["RUNNING", "evaluating"]

RUNNING: dict[Any, list[Any]] = {}
"""Of each part of a module that is being run: by how many threads, and whether it was in training mode before."""

_CHANGING = threading.Lock()


@contextlib.contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """A module in evaluation mode, and then again as it was: some parts may be frozen, some not.

    Threads may share one, and parts of it: as it was is what each part is again when the last one is done.
    """
    parts = list(module.modules())
    with _CHANGING:
        for part in parts:
            RUNNING.setdefault(part, [0, part.training])[0] += 1
    try:
        with _CHANGING, contextlib.suppress(NotImplementedError):  # torch.export's have the mode of their export
            module.eval()
        yield
    finally:
        with _CHANGING:
            for part in parts:
                RUNNING[part][0] -= 1
                if not RUNNING[part][0]:
                    part.training = RUNNING.pop(part)[1]
