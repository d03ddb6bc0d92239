"""Lines and bars on stderr, for people; a program without a console, such as a service of Windows, has none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["bars", "on_terminal", "say"]


def say(message: str) -> None:
    """One line on stderr."""
    if sys.stderr is not None:
        sys.stderr.write(f"wn21k: {message}\n")
        sys.stderr.flush()


def on_terminal() -> bool:
    """Whether stderr is one, where a bar can move."""
    return sys.stderr is not None and sys.stderr.isatty()


def bars(*columns: Any, **options: Any) -> Progress:
    """Progress bars of rich on stderr; in a pipe or a file they are 120 columns wide."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True, width=None if on_terminal() else 120)
    # rich would draw what a program prints meanwhile above the bar, on stderr: data stays on stdout.
    return Progress(*columns, console=console, redirect_stdout=False, **options)
