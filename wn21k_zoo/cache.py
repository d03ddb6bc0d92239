"""The download cache: where each file is stored, and its receipt, which records what is known about it.

Files are ``CACHE/hub/ORG--NAME[@REVISION]/FILE`` and ``CACHE/url/HOST/PATH/FILE``, each with a receipt ``FILE.json``. A
copy of that folder on a web server is a mirror (``WN21K_MIRROR``). Reading the cache writes nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_type_hints
from urllib.parse import quote, urlsplit

from wn21k_zoo.checkpoints import HubSource, URLSource
from wn21k_zoo.errors import CacheError, first_line
from wn21k_zoo.files import expanded, parse_json, replace, user_cache

__all__ = [
    "PART_SUFFIX",
    "Receipt",
    "cache_dir",
    "leftovers",
    "lock_path",
    "read_receipt",
    "readable",
    "receipts",
    "relative_path",
    "remove",
    "write_receipt",
]

LEFTOVER_SECONDS = 24 * 3600.0
FOLDERS = ("hub", "url")  # anything else in the cache folder is not ours
RECEIPT_SUFFIX = ".json"
PART_SUFFIX = ".part"
LOCK_SUFFIX = ".lock"
_PART_NAME = re.compile(rf"(.+)\.(?:[0-9a-f]{{16}}|unknown|json){re.escape(PART_SUFFIX)}")


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What is known about a fetched file.

    Attributes:
        source: Key of the source it comes from.
        filename: Its name there.
        revision: Commit on the Hub, None elsewhere.
        num_bytes: Its size.
        sha256: Hash of its content when it was fetched.
        checked_against: Who stated the hash it was compared with; None if nobody did.
    """

    source: str
    filename: str
    revision: str | None
    num_bytes: int
    sha256: str
    checked_against: str | None

    def to_json(self) -> str:
        """The text of the receipt file."""
        return json.dumps(asdict(self), indent=2) + "\n"


def cache_dir(folder: str | os.PathLike[str] | None = None) -> Path:
    """Return the cache folder: the argument, ``WN21K_CACHE``, or the user's cache folder on this system.

    Raises:
        CacheError: It belongs in a home folder that is not known, or no folder can have its name.
    """
    chosen = folder or os.environ.get("WN21K_CACHE")
    if not chosen:
        return user_cache(CacheError, "WN21K_CACHE")
    try:
        return expanded(chosen, CacheError).absolute()
    except CacheError as error:
        raise CacheError(f"The cache folder (WN21K_CACHE or --cache-dir): {error}") from None


@contextlib.contextmanager
def readable() -> Iterator[None]:
    """Within, a folder that this user may not look into is an error of ours.

    Raises:
        CacheError: There is one.
    """
    try:
        yield
    except PermissionError as error:
        raise CacheError(
            f"{error.filename} cannot be read ({error.strerror}); ask its owner to share the cache, or set "
            "WN21K_CACHE, or HF_HOME for that of the Hub, to another folder."
        ) from error


def relative_path(source: HubSource | URLSource, filename: str) -> PurePosixPath:
    """Path of a file in the cache and on a mirror; it contains a revision that was named, but not a locked commit."""
    if isinstance(source, HubSource):
        named = source.revision if not source.sha256 else None
        folder = source.repo_id.replace("/", "--") + (f"@{quote(named, safe='')}" if named else "")
        return PurePosixPath("hub", folder, filename)
    address = urlsplit(source.url)
    parts = [quote(part, safe="._-") for part in PurePosixPath(address.path).parts if part not in ("/", "..")]
    return PurePosixPath("url", quote(address.netloc, safe="._-"), *parts)


def read_receipt(path: Path) -> Receipt | None:
    """Return the receipt of a file, None if it has no readable one."""
    try:
        return receipt_from_json(receipt_path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def receipt_from_json(text: str) -> Receipt:
    """Parse a receipt.

    Raises:
        ValueError: The text is not a receipt.
    """
    content = parse_json(text)
    kinds = get_type_hints(Receipt)
    if not isinstance(content, dict) or not all(isinstance(content.get(name), kind) for name, kind in kinds.items()):
        raise ValueError("not a receipt")
    if content["num_bytes"] < 0 or not re.fullmatch("[0-9a-f]{64}", content["sha256"]):
        raise ValueError("not a receipt")
    values: dict[str, Any] = {name: content.get(name) for name in kinds}
    return Receipt(**values)


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Write a receipt next to its file; the caller must hold the file's lock.

    Raises:
        CacheError: It cannot be written.
    """
    temporary = receipt_path(path).with_name(f"{receipt_path(path).name}{PART_SUFFIX}")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            file.write(receipt.to_json())
        replace(temporary, receipt_path(path))
    except OSError as error:
        raise CacheError(f"{receipt_path(path)} cannot be written ({error.strerror}); set WN21K_CACHE.") from error


def receipt_path(path: Path) -> Path:
    """Path of a file's receipt."""
    return path.with_name(path.name + RECEIPT_SUFFIX)


def lock_path(path: Path) -> Path:
    """Path of the lock of a file, or of an unfinished part of it."""
    part = _PART_NAME.fullmatch(path.name)
    return path.with_name((part[1] if part else path.name) + LOCK_SUFFIX)


def receipts(folder: Path) -> Iterator[tuple[Path, Receipt]]:
    """Yield the path of each fetched file, also if it is gone, and its receipt."""
    for path in _files(folder):
        fetched = path.with_name(path.name.removesuffix(RECEIPT_SUFFIX))
        if fetched.name != path.name and (receipt := read_receipt(fetched)) is not None:
            yield fetched, receipt


def leftovers(folder: Path, older_than: float = LEFTOVER_SECONDS) -> Iterator[Path]:
    """Yield unfinished downloads that were not written to for ``older_than`` seconds."""
    for path in _files(folder):
        if _PART_NAME.fullmatch(path.name):
            with contextlib.suppress(OSError):  # another process was faster
                state = path.lstat()
                if stat.S_ISREG(state.st_mode) and time.time() - state.st_mtime > older_than:
                    yield path


def remove(path: Path, root: Path) -> int | None:
    """Remove a file, its receipt and lock, and the folders below ``root`` that this leaves empty.

    Returns:
        The bytes freed; None if the file stays because another process holds its lock.

    Raises:
        CacheError: It cannot be removed.
    """
    from filelock import FileLock, Timeout

    if not path.parent.is_dir():
        return 0
    try:
        with FileLock(lock_path(path)).acquire(timeout=0):
            freed = path.lstat().st_size if path.is_file() else 0
            path.unlink(missing_ok=True)
            receipt_path(path).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # Windows does not remove open files
                lock_path(path).unlink()  # while we hold it: afterwards another process may
    except Timeout:
        return None
    except (OSError, NotImplementedError) as error:  # the latter on file systems without locks
        raise CacheError(f"{path} cannot be removed ({first_line(error)}); ask its owner to.") from error
    for parent in path.parents:
        if not parent.is_relative_to(root) or parent == root:
            break
        try:
            parent.rmdir()
        except OSError:  # not empty
            break
    return freed


def _files(folder: Path) -> Iterator[Path]:
    with readable():
        found = [path for name in FOLDERS for path in sorted((folder / name).rglob("*")) if path.is_file()]
    yield from found
