"""One process at a time, using a lock that the system releases when its holder dies."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from wn21k_zoo.errors import Wn21kError, first_line

__all__ = ["exclusive"]

POLL_SECONDS = 0.1
_LOG = logging.getLogger(__name__)


def _holder(file: Path) -> str:
    """Say who holds a lock, where filelock had to write that down since the file system has no locks of its own."""
    try:
        process, host = file.read_text(errors="replace").splitlines()[:2]
    except (OSError, ValueError):
        return ""
    return f" (That is process {process:.20} on {host:.100}; if it is gone, remove {file}.)"


@contextlib.contextmanager
def exclusive(
    file: Path,
    error: type[Wn21kError],
    advice: str,
    *,
    busy: str | None = None,
    seconds: float = 0.0,
    waiting: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hold the lock of a file, so that no other process has it.

    Args:
        file: The file to lock; created if missing.
        error: Class of the errors to raise.
        advice: What to do where nothing can be locked, as on some network file systems.
        busy: Message of the error if another process holds the lock for longer than ``seconds``; None to wait for it.
        seconds: How long to wait at first.
        waiting: Called after ``seconds``, before waiting without a limit.

    Raises:
        Wn21kError: Of class ``error``: another process holds the lock, or nothing can be locked there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        try:
            lock.acquire(timeout=seconds, poll_interval=POLL_SECONDS)
        except Timeout:
            if busy is not None:
                raise error(f"{busy}{_holder(file)}") from None
            if holder := _holder(file):
                _LOG.warning("waiting for the lock %s%s", file, holder)
            waiting()
            lock.acquire(poll_interval=POLL_SECONDS)
    except (OSError, NotImplementedError) as problem:  # the latter on file systems without locks
        number = getattr(problem, "errno", errno.ENOTSUP)
        mount = "mount its disk with locks (Lustre: flock), or " if number in (errno.ENOLCK, errno.ENOTSUP) else ""
        raise error(f"{file.parent} cannot be locked ({first_line(problem)}); {mount}{advice}") from problem
    try:
        yield
    finally:
        lock.release()
