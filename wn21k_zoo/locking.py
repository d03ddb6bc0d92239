"""The lock file: revision, size and sha256 of every source, updated by whoever maintains the records."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from wn21k_zoo import download, hub
from wn21k_zoo.checkpoints import LOCK_FILE, Checkpoint, HubSource, PackageSource, URLSource, apply_lock
from wn21k_zoo.errors import ModelError, RecordError, RemoteNotFoundError, first_line
from wn21k_zoo.files import parse_json, write_whole

__all__ = ["lock_sources", "read_lock", "write_lock"]

Lock = dict[str, dict[str, Any]]


def read_lock(path: Path | None = None) -> Lock:
    """Read a lock file, by default the shipped one.

    Raises:
        RecordError: It cannot be read.
    """
    place = path or resources.files("wn21k_zoo") / "_data" / LOCK_FILE
    try:
        content = parse_json(place.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"The lock file {place} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(fields, dict) for fields in content.values()):
        raise RecordError(f"{place} is not a lock file.")
    apply_lock((), content)
    return content


def lock_sources(
    checkpoints: Iterable[Checkpoint], known: Mapping[str, Mapping[str, Any]], tell: Callable[[str, str | None], None]
) -> tuple[Lock, int]:
    """Ask every source what it has now.

    The Hub states revision, size and hash. A file on a plain server is fetched and hashed. A source that cannot be
    asked keeps its former entry.

    Args:
        checkpoints: Checkpoints whose sources to ask.
        known: The lock so far.
        tell: Called with each source and what went wrong there, None if nothing did.

    Returns:
        The new lock and how many sources could not be asked.
    """
    lock = {key: dict(fields) for key, fields in known.items()}
    failed = 0
    sources = (source for checkpoint in checkpoints for source in checkpoint.sources)
    for source in dict.fromkeys(source for source in sources if not isinstance(source, PackageSource)):
        try:
            lock[source.key] = _ask(source)
        except ModelError as error:
            failed += 1
            tell(str(source), str(error))
        else:
            tell(str(source), None)
    return dict(sorted(lock.items())), failed


def write_lock(lock: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Write a lock file; it appears only once it is complete.

    Raises:
        RecordError: It cannot be written.
    """
    write_whole(path, json.dumps(lock, indent=2) + "\n", RecordError)


def _ask(source: HubSource | URLSource) -> dict[str, Any]:
    if isinstance(source, HubSource):
        anew = replace(source, sha256=None, num_bytes=None, revision=None)
        _, expected, commit, _ = hub.resolve(anew, source.filenames[0])
        if expected.sha256 is None or commit is None or expected.num_bytes is None:
            raise RemoteNotFoundError(
                f"{source} states no sha256 of {source.filenames[0]}; it is not a large file there."
            )
        return {"revision": commit, "num_bytes": expected.num_bytes, "sha256": expected.sha256}
    anew_url = replace(source, sha256=None, num_bytes=None)
    with tempfile.TemporaryDirectory() as folder:
        fetched = download.fetch_source(anew_url, cache_dir=folder)  # not from a mirror: the lock is authoritative
        return {"num_bytes": fetched.num_bytes, "sha256": fetched.sha256}
