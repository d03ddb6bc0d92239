"""Lines and bars on stderr, for people; a program without a console, such as a service of Windows, has none.

A terminal that is closed, or a log whose disk is full, ends nothing: the work counts, not the words.
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

__all__ = ["bars", "forget_unheard", "on_terminal", "printable", "say"]

_CONTROLS = {code: repr(chr(code))[1:-1] for code in (*range(0x20), *range(0x7F, 0xA0))}


def printable(text: str) -> str:
    """The same with control characters as escapes: names of files and classes of others may not command a terminal."""
    return text.translate(_CONTROLS)


def say(message: str) -> None:
    """One line on stderr."""
    if sys.stderr is not None:
        stream = _Lossy(sys.stderr)
        stream.write(f"wn21k: {printable(message)}\n")
        stream.flush()


def on_terminal() -> bool:
    """Whether stderr is one, where a bar can move."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def forget_unheard() -> None:
    """At the end of a process: what its streams hold and cannot be written would make another exit code of it."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        _Lossy(stream).flush()


def bars(*columns: Any, **options: Any) -> Progress:
    """Progress bars of rich on stderr; in a pipe or a file they are 120 columns wide."""
    from rich.console import Console
    from rich.progress import Progress

    file = cast("IO[str]", _Lossy(sys.stderr)) if sys.stderr is not None else None
    console = Console(file=file, stderr=True, width=None if on_terminal() else 120)
    # rich would draw what a program prints meanwhile above the bar, on stderr: data stays on stdout.
    return Progress(*columns, console=console, redirect_stdout=False, **options)


class _Lossy:
    """A stream, of which what cannot be written is lost, and all that comes after it.

    Else it would stay in the stream's buffer, and fail again wherever that is flushed, as each start of a process does.
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
        except (BlockingIOError, ValueError):  # whoever reads it is slow, or it is closed
            pass
        except OSError:
            with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
                self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
