"""Background writing of a run's checkpoints, each either complete or absent."""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.serialization import config

from wn21k_zoo.errors import RunError, first_line
from wn21k_zoo.files import atomic_file, replace
from wn21k_zoo.training.state import RunFolder

__all__ = ["CheckpointWriter", "copied"]


class CheckpointWriter:
    """Writes checkpoints in the background, one at a time, and removes old ones once a newer one is in place.

    Args:
        folder: The run's folder.
        keep: How many of the latest checkpoints to keep.
    """

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self._folder, self._keep = folder, keep
        self._queue: queue.Queue[tuple[dict[str, Any], bool] | None] = queue.Queue(maxsize=1)
        self._problem: BaseException | None = None
        self._is_full = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def save(self, state: Mapping[str, Any], best: bool = False, wait: bool = False) -> None:
        """Copy a state and write it; waits for the previous one, and with ``wait`` for this one.

        So there is at most one copy in memory.

        Raises:
            RunError: A checkpoint could not be written.
        """
        self._queue.join()
        self.write(copied(dict(state)), best)
        self.wait() if wait else self.check()

    def write(self, state: dict[str, Any], best: bool = False) -> None:
        """Queue a state whose tensors nobody changes; :meth:`wait` reports how writing it went."""
        self._queue.put((state, best))

    def wait(self) -> None:
        """Wait until all checkpoints are written.

        Raises:
            RunError: One could not be written.
        """
        self._queue.join()
        self.check()

    def close(self) -> None:
        """Wait for the last checkpoint, and accept no more.

        Raises:
            RunError: It could not be written.
        """
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self.check()

    def check(self) -> None:
        """Check that all writes so far have succeeded.

        Raises:
            RunError: One could not be written.
        """
        if self._problem is not None:
            why = first_line(self._problem)
            if self._is_full:
                where = f"on the disk of {self._folder.path}, or in your quota there"
                why = f"no space is left {where}; make room and run the same command again"
            raise RunError(f"The checkpoint cannot be written: {why}; earlier ones are unchanged.") from self._problem

    def _work(self) -> None:
        while (task := self._queue.get()) is not None:
            try:
                self._write(*task)
            except BaseException as error:
                self._problem = error
                if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
                    self._problem = error.__context__  # torch.save does not report why it could not write
                self._is_full = getattr(self._problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
                with contextlib.suppress(OSError):
                    self._is_full |= shutil.disk_usage(self._folder.path).free < _bytes_of(task[0])
            finally:
                del task  # the next state is copied as soon as this one is done
                self._queue.task_done()
        self._queue.task_done()

    def _write(self, state: dict[str, Any], best: bool) -> None:
        path = self._folder.checkpoints / f"step-{state['step']:08d}.pt"
        with atomic_file(path) as file:
            # A program may have turned them off.
            with config.patch("save.compute_crc32", True):  # type: ignore[attr-defined]
                torch.save(state, file)
            if best:  # before the checkpoint that records it is in place
                file.flush()
                os.fsync(file.fileno())
                self._write_best(Path(file.name))
        for old in self._folder.steps()[self._keep :]:
            with contextlib.suppress(PermissionError):  # on Windows while another program reads it: next time
                old.unlink(missing_ok=True)

    def _write_best(self, source: Path) -> None:
        temporary = self._folder.best.with_suffix(".tmp")
        temporary.unlink(missing_ok=True)
        # Windows cannot rename another hard link to a file that is open.
        link = os.link if os.name != "nt" else shutil.copyfile
        try:
            link(source, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, temporary)
        replace(temporary, self._folder.best, patience=60)  # evaluations read it, and this thread may wait


def _bytes_of(value: Any) -> int:
    """Total size of the tensors in a value, in bytes."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(_bytes_of(part) for part in parts)


def copied(value: Any) -> Any:
    """Copy a value, with all its tensors copied to the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: copied(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(each) for each in value)
    return value
