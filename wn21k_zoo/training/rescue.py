"""End a run that was told to stop but does not get there: inside a step of minutes, or waiting for another rank."""

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
    """Writes whatever checkpoint is possible, from a thread other than the run's, and marks the run preempted.

    Args:
        folder: Folder of the run.
        world: Its processes; all but the leading one wait until that is done.

    Attributes:
        changing: Lock to hold while changing what a checkpoint holds.
        save: Writes a checkpoint of the current state, called with that lock; None while there is nothing to write.
        begun: Whether the status of the run is from this start, not an earlier one.
    """

    def __init__(self, folder: RunFolder, world: World) -> None:
        self._folder, self._world = folder, world
        self.changing = threading.RLock()
        self.save: Callable[[], None] | None = None
        self.begun = False

    def __call__(self, until: float) -> None:
        """Write the checkpoint and mark the run preempted; a run that failed on another rank is not marked.

        Args:
            until: Deadline, by :func:`time.monotonic`; what is not written by then is abandoned.

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
        if self._failed():  # on another rank, which made torchrun end this one
            return
        step = self._folder.newest_step()
        mark_preempted(self._folder.path, step)
        say(f"told to stop, the run abandoned what it was doing; when started again it resumes at step {step:,}")

    def keep(self, until: float) -> None:
        """Write whatever checkpoint is possible; one that is not written by the deadline is abandoned."""
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
