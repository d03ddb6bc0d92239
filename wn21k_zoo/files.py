"""Write files whole or not at all; check and read file names and contents."""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import re
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from wn21k_zoo.errors import DataOutputError, Wn21kError, first_line

__all__ = [
    "RECIPE_FILE",
    "THE_SYSTEMS",
    "atomic_file",
    "check_writable",
    "expanded",
    "in_package",
    "is_hidden",
    "is_run",
    "local_path",
    "make_folder",
    "parse_json",
    "refuse_compressed",
    "replace",
    "sha256_of",
    "text_of",
    "user_cache",
    "visible",
    "write_whole",
]


RECIPE_FILE = "recipe.json"
"""The recipe in the folder of a training run."""

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):[/\\]+(.*)", re.DOTALL)  # a Path merges two slashes; C:/ is a drive
_OF_STREAMS = (Path("/dev"), Path("/dev/fd"))  # not /dev/shm, which is a disk in memory
THE_SYSTEMS = (
    "__MACOSX", "$RECYCLE.BIN", "$Recycle.Bin", "System Volume Information", "desktop.ini", "Desktop.ini", "Thumbs.db",
    "lost+found", "@eaDir",
)  # fmt: skip
"""Names that operating systems put into folders, besides those that begin with a dot."""


def expanded(place: str | os.PathLike[str], kind: type[Wn21kError]) -> Path:
    """Expand ~ in a path to a home folder; nothing need be there.

    Raises:
        Wn21kError: Of class ``kind``: there is no such user, or no file can have this name.
    """
    if not isinstance(place, (str, os.PathLike)):
        raise kind(f"{place!r:.60} is not a path; give a str or a pathlib.Path.")
    try:
        path = Path(place).expanduser()
        os.lstat(path)
    except RuntimeError:
        raise kind(f"{os.fspath(place)}: this home folder is not known; write the full path.") from None
    except ValueError as error:  # a null, half a character
        raise kind(f"{os.fspath(place)!r} is no file name: {first_line(error)}.") from None
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise kind(f"{os.fspath(place)} is too long for a file name; give a shorter one.") from None
    return path


def local_path(
    place: str | os.PathLike[str],
    kind: type[Wn21kError],
    instead: str = "name a path of this machine, and copy the output from there.",
) -> Path:
    """Like :func:`expanded`, for what cannot be a URL; an output would create a folder such as ``s3:`` here.

    Raises:
        Wn21kError: Of class ``kind``: it is a URL; or as :func:`expanded`.
    """
    is_name = isinstance(place, (str, os.PathLike))
    if is_name and (url := _URL.fullmatch(os.fspath(place))) and not Path(f"{url[1]}:").is_dir():
        raise kind(f"{url[1]}://{url[2]} is a URL; {instead}")
    return expanded(place, kind)


def user_cache(kind: type[Wn21kError], variable: str) -> Path:
    """Return the user's cache folder on this system.

    Raises:
        Wn21kError: Of class ``kind``: the user has none.
    """
    import platformdirs

    try:
        return platformdirs.user_cache_path("wn21k_zoo")
    except RuntimeError:
        raise kind(f"This user has no home folder and thus no cache; set {variable} to a folder.") from None


@contextlib.contextmanager
def atomic_file(path: Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a file that appears at ``path`` after the block, complete and (``sync``) on disk; not at all if that fails.

    A link stays a link, to the new file; anything but a regular file, such as /dev/stdout, is written directly.
    """
    if _is_special(path):
        with path.open("wb") as file:
            yield file
        return
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process; or a link, in a shared folder
        with temporary.open("xb") as file:
            try:
                yield file
            except BaseException:
                with contextlib.suppress(OSError):  # it would hide the error
                    file.close()
                raise
            file.flush()
            if sync:
                os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync_folder(path.parent)


def _is_special(path: Path) -> bool:
    """Whether a path is a pipe or a device, such as /dev/stdout, wherever that leads."""
    return path.exists() and (not path.is_file() or path.parent in _OF_STREAMS)


def write_whole(path: Path, content: bytes | str, kind: type[Wn21kError] | None = None, sync: bool = True) -> None:
    """Write a small file, whole or not at all; text as UTF-8.

    Raises:
        Wn21kError: Of class ``kind``: it cannot be written. Without ``kind`` the OSError is raised as it is.
    """
    try:
        with atomic_file(path, sync) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        if kind is None:
            raise
        advice = "make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
        raise kind(f"{path} cannot be written: {error.strerror or first_line(error)}; {advice}.") from error


def make_folder(folder: Path, kind: type[Wn21kError], advice: str) -> None:
    """Create a folder if it does not exist; for a link that leads nowhere, where it leads.

    Raises:
        Wn21kError: Of class ``kind``, with ``advice``: it cannot be created.
    """
    try:
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise kind(f"{folder} cannot be created: {first_line(error)}; {advice}") from None


def refuse_compressed(path: Path) -> None:
    """Refuse a file whose parts are compressed, as ``torch.save`` never does: they may be of any size.

    Raises:
        ValueError: They are.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            if any(part.compress_type != zipfile.ZIP_STORED for part in file.infolist()):
                raise ValueError("its parts are compressed, unlike those that torch.save writes")


def parse_json(text: str | bytes) -> Any:
    """Parse JSON from any source.

    Raises:
        ValueError: It is not JSON, or its brackets are nested too deeply.
    """
    try:
        return json.loads(text.removeprefix("\ufeff") if isinstance(text, str) else text)
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None


def text_of(content: bytes) -> str:
    """Decode UTF-8, or what Windows programs write: text with a byte order mark, possibly UTF-16.

    Raises:
        UnicodeDecodeError: It is neither.
    """
    marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return content.decode("utf-16" if marked else "utf-8-sig")


def replace(source: Path, target: Path, patience: float = 1.0) -> None:
    """Move a file or folder to its final name.

    On Windows this may have to wait for a program, such as a virus scanner, that has the old file, or one in it, open.

    Args:
        source: The file or folder to rename.
        target: Its new name.
        patience: How many seconds to wait, roughly.
    """
    end = time.monotonic() + patience
    while os.name == "nt" and time.monotonic() < end:
        try:
            source.replace(target)
        except PermissionError:
            time.sleep(0.05)
        else:
            return
    source.replace(target)


def sha256_of(path: Path) -> str:
    """The hash of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_hidden(name: str) -> bool:
    """Whether a name is that of something no user made: thumbnails, ``._NAME`` of macOS, a disk's recycle bin."""
    return name.startswith(".") or name in THE_SYSTEMS


def visible(folder: Path, pattern: str) -> list[Path]:
    """List a folder's matches, sorted, without the ._NAME that macOS puts next to NAME on many file systems."""
    return sorted(path for path in folder.glob(pattern) if not is_hidden(path.name))


def _sync_folder(folder: Path) -> None:
    """Flush a file's new name to disk as well; not every system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    return (folder / RECIPE_FILE).is_file()


def in_package(package: str, path: str) -> Path | None:
    """Path of a file in another package's folder, without importing it; None if it is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    found = Path(spec.submodule_search_locations[0]) / path
    return found if found.is_file() else None


def check_writable(path: Path) -> None:
    """Check that a file can be written, before doing the work for it.

    Raises:
        DataOutputError: It cannot.
    """
    if path.is_dir():
        raise DataOutputError(f"{path} is a folder; name a file.")
    if not path.absolute().parent.is_dir():
        raise DataOutputError(f"{path} cannot be written: there is no folder {path.absolute().parent}.")
    if _is_special(path):
        return
    real = Path(os.path.realpath(path))
    try:  # os.access tells nothing on Windows, where another program may also have the file open
        if real.exists():
            real.open("ab").close()
        trial = real.with_name(f".{real.name}.{os.getpid()}.tmp")
        trial.open("xb").close()  # tempfile would keep retrying there
        trial.unlink()
    except OSError as error:
        raise DataOutputError(f"{path} cannot be written: {error.strerror}; name another file.") from None
