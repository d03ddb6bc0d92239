"""The status of a run, in ``status.json`` of its folder: running, preempted, finished or failed, and at which step.

While it is running, that is the step of its newest checkpoint, which may not be fully written yet.

Launch files read it. Nothing here needs torch, so it can be written before torch is imported.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from wn21k_zoo.errors import RunError
from wn21k_zoo.files import RECIPE_FILE, is_hidden, make_folder, parse_json, write_whole

__all__ = ["ELSEWHERE", "STATUS_FILE", "mark_preempted", "read_status", "write_status", "write_text"]

STATUS_FILE = "status.json"
ELSEWHERE = "name another output folder."


def read_status(folder: Path) -> dict[str, Any]:
    """The status of the run in a folder; empty if it never began."""
    try:
        content = parse_json((folder / STATUS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_status(folder: Path, state: str, step: int, **more: Any) -> None:
    """Write the status of the run in a folder; without a sync, as a run told to stop has 30 seconds on any disk.

    Raises:
        RunError: It cannot be written.
    """
    write_text(folder / STATUS_FILE, json.dumps({"state": state, "step": step, **more}, indent=1) + "\n", sync=False)


def write_text(path: Path, text: str, sync: bool = True) -> None:
    """Write a small file of a run atomically, unless it has that text already.

    Raises:
        RunError: It cannot be written.
    """
    try:
        if path.read_bytes() == text.encode():
            return
    except OSError:  # it does not exist
        pass
    write_whole(path, text, RunError, sync)


def mark_preempted(folder: Path, step: int | None = None) -> None:
    """Mark a run as told to stop.

    A finished run stays finished; a folder with something else in it is left alone.

    Args:
        folder: Of the run; created if missing.
        step: Of its newest checkpoint; by default the one in the status so far.

    Raises:
        RunError: It cannot be written.
    """
    status = read_status(folder)
    if status.get("state") == "finished":
        return
    try:
        names = {entry.name for entry in folder.iterdir() if not is_hidden(entry.name)}
        if names and not status and RECIPE_FILE not in names:
            return
    except FileNotFoundError:
        pass
    except OSError:  # a file
        return
    kept = {key: value for key, value in status.items() if key == "total"}
    make_folder(folder, RunError, ELSEWHERE)
    write_status(folder, "preempted", status.get("step", 0) if step is None else step, **kept)
