"""Messages and progress bars on stderr, for people; without a console, as in a Windows service, there are none.

A closed terminal, or a log on a full disk, does not end the program: the work counts, not the messages.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from typing import IO

    from rich.progress import Progress

__all__ = ["bar_column", "bars", "forget_unheard", "on_terminal", "printable", "say"]

_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0))}


def printable(text: str) -> str:
    """Escape control characters, so that others' names of files and classes cannot send commands to a terminal."""
    return text.translate(_CONTROLS)


def say(message: str) -> None:
    """Print one line to stderr."""
    if sys.stderr is not None:
        stream = _Lossy(sys.stderr)
        stream.write(f"wn21k: {printable(message)}\n")
        stream.flush()


def on_terminal() -> bool:
    """Whether stderr is a terminal, where a progress bar can move."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def forget_unheard() -> None:
    """Flush the streams at the end of a process and drop what cannot be written: it would change the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        _Lossy(stream).flush()


def bars(*columns: Any, **options: Any) -> Progress:
    """Create rich's progress bars on stderr; in a pipe or a file they are 120 columns wide."""
    from rich.console import Console
    from rich.progress import Progress

    file = cast("IO[str]", _Lossy(sys.stderr)) if sys.stderr is not None else None
    console = Console(file=file, stderr=True, width=None if on_terminal() else 120)
    # By default rich moves what a program prints meanwhile to stderr, above the bar: data must stay on stdout.
    return Progress(*columns, console=console, redirect_stdout=False, **options)


def bar_column() -> Any:
    """Create the column of the bar itself, which becomes shorter where the others need the room."""
    from rich.progress import BarColumn
    from rich.table import Column

    return BarColumn(bar_width=None, table_column=Column(max_width=40))


class _Lossy:
    """A stream that drops output that cannot be written, and all output after it.

    Otherwise it would stay in the stream's buffer and fail at each flush, such as at each start of a process.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._closed():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._closed():
            self._stream.flush()

    @contextlib.contextmanager
    def _closed(self) -> Iterator[None]:
        try:
            yield
        except (BlockingIOError, ValueError):  # its reader is slow, or it is closed
            pass
        except OSError:
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
