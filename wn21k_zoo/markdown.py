"""Tables for cards and summaries."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["UNKNOWN", "markdown_table"]

UNKNOWN = "unknown"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; None is shown as unknown."""

    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(UNKNOWN if cell is None else str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *(line(row) for row in rows)])
