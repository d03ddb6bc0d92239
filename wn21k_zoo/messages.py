"""Lines on stderr, for people; a program without a console, such as a service of Windows, has none."""

from __future__ import annotations

import sys

__all__ = ["on_terminal", "say"]


def say(message: str) -> None:
    """One line on stderr."""
    if sys.stderr is not None:
        sys.stderr.write(f"wn21k: {message}\n")
        sys.stderr.flush()


def on_terminal() -> bool:
    """Whether stderr is one, where a bar can move."""
    return sys.stderr is not None and sys.stderr.isatty()
