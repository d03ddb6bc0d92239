"""One process at a time, by a lock that the system frees when its holder dies."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from wn21k_zoo.errors import Wn21kError, first_line

__all__ = ["exclusive"]

POLL_SECONDS = 0.1


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
    """Within, no other process has the lock of a file.

    Args:
        file: That is locked; made if it is not there.
        error: Kind of what is raised.
        advice: What to do where nothing can be locked, as on some network file systems.
        busy: What is said when another process has it for longer than ``seconds``; None: it is waited for.
        seconds: Of patience.
        waiting: Called when they are over, before it is waited for.

    Raises:
        Wn21kError: Of that kind: another process has it, or nothing can be locked there.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(file)
    try:
        try:
            lock.acquire(timeout=seconds, poll_interval=POLL_SECONDS)
        except Timeout:
            if busy is not None:
                raise error(busy) from None
            waiting()
            lock.acquire(poll_interval=POLL_SECONDS)
    except (OSError, NotImplementedError) as problem:  # the latter from a file system without locks
        raise error(f"{file.parent} cannot be locked ({first_line(problem)}); {advice}") from problem
    try:
        yield
    finally:
        lock.release()
