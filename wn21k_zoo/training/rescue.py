"""The end of a run that was told to stop and does not come to it: inside a step of minutes, or waiting for another."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from wn21k_zoo.errors import first_line
from wn21k_zoo.messages import on_terminal, say
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.state import RunFolder
from wn21k_zoo.training.status import mark_preempted

__all__ = ["Rescue"]


class Rescue:
    """Writes, from another thread than the run's, the checkpoint that can be had, and marks the run preempted.

    Args:
        folder: Of the run.
        world: Its processes; all but the leading one wait until that is done.

    Attributes:
        changing: Whoever changes what a checkpoint holds has this lock meanwhile.
        save: Writes a checkpoint of what is there, called with that lock; None while there is nothing to write.
        begun: Whether the status of the run is of this time, and not of one before.
    """

    def __init__(self, folder: RunFolder, world: World) -> None:
        self._folder, self._world = folder, world
        self.changing = threading.RLock()
        self.save: Callable[[], None] | None = None
        self.begun = False

    def __call__(self, until: float) -> None:
        """Do it; a run that failed on another rank is not marked.

        Args:
            until: When to be done, by :func:`time.monotonic`; what is not written then is left.

        Raises:
            RunError: The mark cannot be written.
        """
        if not self._world.leads:
            while time.monotonic() < until and not self._failed() and self._state() != "preempted":
                time.sleep(0.1)
            return
        self.keep(until)
        if on_terminal():
            sys.stderr.write("\x1b[?25h\n")  # the bar hides the cursor
        if self._failed():  # on another rank, for whose sake torchrun ends this one
            return
        step = self._folder.newest_step()
        mark_preempted(self._folder.path, step)
        say(f"told to stop, it left what it was in; begun again it goes on at step {step:,}")

    def keep(self, until: float) -> None:
        """Write the checkpoint that can be had; one that is not written until then is left."""
        thread = threading.Thread(target=self._save, daemon=True)
        thread.start()
        thread.join(max(0.0, until - time.monotonic()))

    def _state(self) -> str | None:
        return self._folder.status().get("state")

    def _failed(self) -> bool:
        return self.begun and self._state() == "failed"

    def _save(self) -> None:
        try:
            with self.changing:
                if self.save is not None:
                    self.save()
        except Exception as error:
            say(first_line(error))
