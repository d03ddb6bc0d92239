"""Where shards are stored: on a local or network disk, read in place, or anywhere fsspec reaches, with a local stage.

What is not on a disk (``s3://``, ``gs://``, ``hf://``, ``https://``) is copied, a shard at a time, into a folder on
this machine, once for all processes, and verified if its sha256 is known; Parquet files become tars there. The folder
is kept below a limit; the least recently used files are removed first.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wn21k_zoo.errors import DataError, DiskSpaceError, InvalidArgumentError, Wn21kError, first_line
from wn21k_zoo.exclusive import exclusive
from wn21k_zoo.files import expanded, make_folder, replace, sha256_of, user_cache

__all__ = ["ELSEWHERE", "Stage", "Storage", "data_cache_dir", "default_stage", "open_storage"]

_GB = 10**9
ELSEWHERE = "set WN21K_DATA_CACHE to a folder on another disk."


def data_cache_dir() -> Path:
    """Folder for staged shards and indexes: ``WN21K_DATA_CACHE``, else in the user's cache folder."""
    named = os.environ.get("WN21K_DATA_CACHE")
    return expanded(named, DataError).absolute() if named else user_cache(DataError, "WN21K_DATA_CACHE") / "data"


@dataclass(frozen=True)
class Storage:
    """A folder of files, by path or URL."""

    url: str
    local: Path | None

    def names(self) -> list[str]:
        """Relative paths of all files below it, sorted."""
        if self.local is not None:
            return sorted(path.relative_to(self.local).as_posix() for path in self.local.rglob("*") if path.is_file())
        fs, root = self._filesystem()
        return sorted(str(path)[len(root) :].lstrip("/") for path in fs.find(root))

    def read_text(self, name: str) -> str | None:
        """The text of a small file, or None if it does not exist."""
        try:
            with self.open(name) as file:
                return file.read().decode()
        except FileNotFoundError:
            return None

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading, seekable."""
        if self.local is not None:
            return (self.local / name).open("rb")
        fs, root = self._filesystem()
        file: IO[bytes] = fs.open(f"{root}/{name}", "rb")
        return file

    def fetch(self, name: str, target: Path) -> None:
        """Copy a file to a local path."""
        fs, root = self._filesystem()
        fs.get_file(f"{root}/{name}", str(target))

    def signature(self, name: str) -> str:
        """A string that changes when the file does: its size, and the time or tag that the storage states."""
        if self.local is not None:
            status = (self.local / name).stat()
            return f"{status.st_size}-{status.st_mtime_ns}"
        fs, root = self._filesystem()
        known: dict[str, Any] = fs.info(f"{root}/{name}")
        tag = next(
            (known[key] for key in ("ETag", "etag", "sha256", "blob_id", "mtime", "LastModified") if key in known), ""
        )
        return f"{known.get('size')}-{tag}"

    def _filesystem(self) -> tuple[Any, str]:
        import fsspec

        fs, root = fsspec.core.url_to_fs(self.url)  # fsspec caches one per process, and makes a new one after a fork
        return fs, str(root).rstrip("/")


def open_storage(place: str | os.PathLike[str]) -> Storage:
    """Open a folder, by path or URL.

    Raises:
        DataError: There is no such folder, or the library for such URLs is missing.
    """
    text = os.fspath(place)
    if not re.match(r"[a-z0-9+.-]{2,}://|[a-z0-9+.-]{2,}::", text):
        local = expanded(text, DataError).absolute()
        if not local.is_dir():
            what = "is a file" if local.exists() else "does not exist"
            raise DataError(
                f"{local} {what}; name a folder of shards or of class folders, or a URL such as s3://bucket/folder."
            )
        return Storage(str(local), local)
    storage = Storage(text, None)
    try:
        storage._filesystem()
    except Exception as error:  # each storage has its own exceptions
        raise DataError(f"{text} cannot be reached: {first_line(error)}") from None
    return storage


@dataclass(frozen=True)
class Stage:
    """A local folder with copies of remote shards.

    Args:
        folder: Shared by all processes of this machine.
        limit: In bytes; above it the least recently used shards are removed.
    """

    folder: Path
    limit: int = 100 * _GB

    def __post_init__(self) -> None:
        if self.limit <= 0:
            raise InvalidArgumentError(f"The limit of the stage is {self.limit} bytes; it must be above 0.")

    def get(
        self, name: str, make: Callable[[Path], None], sha256: str | None = None, num_bytes: int | None = None
    ) -> Path:
        """The staged file of that name; if it is missing, or has another size, ``make`` writes it, in one process.

        Raises:
            DataError: It cannot be made, or has another sha256; or its name, which comes from the data set's list of
                files, points outside the stage.
            DiskSpaceError: No space is left.
        """
        path = self.folder / name
        if Path(name).anchor or ".." in Path(name).parts:
            raise DataError(
                f"{name} is not the name of a shard: it leads outside the data set, which cannot be trusted."
            )

        def is_there() -> bool:
            return path.is_file() and num_bytes in (None, path.stat().st_size)

        if not is_there():
            make_folder(path.parent, DataError, ELSEWHERE)
            with exclusive(Path(f"{path}.lock"), DataError, ELSEWHERE):
                if not is_there():
                    self._make(path, make, sha256)
        with contextlib.suppress(OSError):
            os.utime(path)  # the time of its last use
        return path

    def _make(self, path: Path, make: Callable[[Path], None], sha256: str | None) -> None:
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.unlink(missing_ok=True)  # a link would be written through
            make(temporary)
            if sha256 is not None:
                got = sha256_of(temporary)
                if got != sha256:
                    raise DataError(f"{path.name} has sha256 {got}, expected {sha256}: it is damaged at its source.")
            # First room, then the file: a process that ends in between leaves less than the limit, not more.
            with exclusive(self.folder / ".lock", DataError, ELSEWHERE):
                self._trim(temporary.stat().st_size)
                replace(temporary, path)
        except Wn21kError:
            raise
        except Exception as error:  # each storage has its own exceptions
            if shutil.disk_usage(path.parent).free < 10**8:
                raise DiskSpaceError(
                    f"No space is left in the stage {self.folder}; choose another folder or a lower limit (for the "
                    "default stage: WN21K_DATA_CACHE and WN21K_DATA_CACHE_GB)."
                ) from None
            raise DataError(f"{path.name} cannot be staged: {first_line(error)}") from None
        finally:
            temporary.unlink(missing_ok=True)

    def _trim(self, room: int) -> None:
        """Remove the least recently used shards until one of that many bytes fits, or all are removed."""
        files = []
        for path in self.folder.rglob("*.tar"):
            with contextlib.suppress(OSError):
                status = path.stat()
                files.append((status.st_mtime, status.st_size, path))
        total = room + sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):  # Windows does not remove open files
                path.unlink(missing_ok=True)
                total -= size


def default_stage() -> Stage:
    """A stage in :func:`data_cache_dir` with a limit of ``WN21K_DATA_CACHE_GB`` GB, by default 100.

    Raises:
        InvalidArgumentError: That is not a number above 0.
    """
    text = os.environ.get("WN21K_DATA_CACHE_GB", "100")
    try:
        limit = int(float(text) * _GB)
    except (ValueError, OverflowError):
        raise InvalidArgumentError(f"WN21K_DATA_CACHE_GB is {text!r}; it must be a number.") from None
    return Stage(data_cache_dir() / "stage", limit)
