"""Where fetched files lie, and what is known about each: a file and, beside it, its receipt.

``CACHE/hub/ORG--NAME[@REVISION]/FILE`` and ``CACHE/url/HOST/PATH/FILE``, each with ``FILE.json``. A copy of that folder
on a web server is a mirror (``WN21K_MIRROR``). Reading it writes nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from wn21k_zoo.checkpoints import HubSource, URLSource
from wn21k_zoo.errors import CacheError

__all__ = [
    "Entry",
    "Receipt",
    "cache_dir",
    "entries",
    "leftovers",
    "read_receipt",
    "relative_path",
    "remove",
    "write_receipt",
]

LEFTOVER_SECONDS = 24 * 3600.0
RECEIPT_SUFFIX = ".json"
PART_SUFFIX = ".part"
LOCK_SUFFIX = ".lock"


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What is known about a fetched file.

    Attributes:
        source: The source that it is a file of.
        filename: Its name there.
        revision: Commit on the Hub, None elsewhere.
        num_bytes: Its size.
        sha256: Of its content when it was fetched.
        checked_against: Who stated the hash that it was compared with; None when nobody does.
    """

    source: str
    filename: str
    revision: str | None
    num_bytes: int
    sha256: str
    checked_against: str | None

    def to_json(self) -> str:
        """The text of the file beside the file."""
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A file in the cache.

    Attributes:
        path: The file.
        receipt: What is known about it, None when its receipt is gone or damaged.
    """

    path: Path
    receipt: Receipt | None


def cache_dir(folder: str | os.PathLike[str] | None = None) -> Path:
    """The cache's folder: the argument, ``WN21K_CACHE``, or the user's cache folder of this system."""
    import platformdirs

    chosen = folder or os.environ.get("WN21K_CACHE")
    return Path(chosen).expanduser().absolute() if chosen else platformdirs.user_cache_path("wn21k_zoo")


def relative_path(source: HubSource | URLSource, filename: str, named_revision: str | None = None) -> PurePosixPath:
    """Place of a file in the cache and on a mirror.

    Args:
        source: The source.
        filename: The file's name there.
        named_revision: Revision that a person asked for; a locked commit is no part of the place.
    """
    if isinstance(source, HubSource):
        folder = source.repo_id.replace("/", "--") + (f"@{quote(named_revision, safe='')}" if named_revision else "")
        return PurePosixPath("hub", folder, filename)
    address = urlsplit(source.url)
    parts = [quote(part, safe="._-") for part in PurePosixPath(address.path).parts if part not in ("/", "..")]
    return PurePosixPath("url", quote(address.netloc, safe="._-"), *parts)


def read_receipt(path: Path) -> Receipt | None:
    """The receipt of a file, None when there is none that can be read."""
    try:
        return receipt_from_json(receipt_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def receipt_from_json(text: str) -> Receipt:
    """The receipt that a text holds.

    Raises:
        ValueError: It holds none.
    """
    content = json.loads(text)
    names = [field.name for field in fields(Receipt)]
    if not isinstance(content, dict) or not isinstance(content.get("sha256"), str):
        raise ValueError("not a receipt")
    values: dict[str, Any] = {name: content.get(name) for name in names}
    return Receipt(**values)


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Lay a receipt beside its file; whoever calls holds the file's lock.

    Raises:
        CacheError: It cannot be written.
    """
    temporary = receipt_path(path).with_name(f"{receipt_path(path).name}{PART_SUFFIX}")
    try:
        temporary.write_text(receipt.to_json(), encoding="utf-8")
        temporary.replace(receipt_path(path))
    except OSError as error:
        raise CacheError(f"{receipt_path(path)} cannot be written ({error.strerror}); set WN21K_CACHE.") from error


def receipt_path(path: Path) -> Path:
    """Where the receipt of a file lies."""
    return path.with_name(path.name + RECEIPT_SUFFIX)


def entries(folder: Path) -> Iterator[Entry]:
    """All fetched files, in order of their paths."""
    for path in sorted(folder.rglob("*")):
        is_ours = not path.name.endswith((PART_SUFFIX, LOCK_SUFFIX)) and not _is_receipt(path)
        if is_ours and path.is_file():
            yield Entry(path=path, receipt=read_receipt(path))


def leftovers(folder: Path, older_than: float = LEFTOVER_SECONDS) -> Iterator[Path]:
    """Unfinished downloads that nobody has written to for ``older_than`` seconds."""
    for path in folder.rglob(f"*{PART_SUFFIX}"):
        try:
            if time.time() - path.lstat().st_mtime > older_than:
                yield path
        except OSError:  # another process was faster
            continue


def remove(path: Path, root: Path) -> int:
    """Remove a file, its receipt and lock, and folders below ``root`` that it leaves empty; returns the bytes freed.

    Raises:
        CacheError: It cannot be removed.
    """
    try:
        freed = path.stat().st_size
        for name in (path, receipt_path(path), path.with_name(path.name + LOCK_SUFFIX)):
            name.unlink(missing_ok=True)
    except FileNotFoundError:
        return 0
    except OSError as error:
        raise CacheError(f"{path} cannot be removed ({error.strerror}).") from error
    for parent in path.parents:
        if not parent.is_relative_to(root) or parent == root:
            break
        try:
            parent.rmdir()
        except OSError:  # not empty
            break
    return freed


def _is_receipt(path: Path) -> bool:
    return path.name.endswith(RECEIPT_SUFFIX) and path.with_name(path.name.removesuffix(RECEIPT_SUFFIX)).is_file()
