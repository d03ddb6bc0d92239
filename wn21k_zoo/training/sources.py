"""Sources of images: every layout in which ImageNet-21K is distributed, as a stream of classes.

Nothing is unpacked. An uncompressed archive is read in place, at the offsets of its classes. A compressed one can only
be read from the beginning, so each class is copied out of the stream, processed, and deleted again.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import IO, Any

from wn21k_zoo.errors import DataSourceError, first_line
from wn21k_zoo.files import is_hidden
from wn21k_zoo.images import IMAGE_SUFFIXES
from wn21k_zoo.synsets import WNID_PATTERN
from wn21k_zoo.training.shards import is_prepared
from wn21k_zoo.training.tars import CutOffError, Header, Window, members_of, tar_stream

__all__ = [
    "LINKED_FOLDER",
    "TO_READ",
    "ClassSource",
    "Member",
    "Source",
    "files_below",
    "is_readable",
    "member_reader",
    "open_source",
    "read_members",
]

_SPLIT_FOLDERS = {
    "imagenet21k_train": "train",
    "imagenet21k_val": "validation",
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
}
_RESIZED = ("imagenet21k_train", "imagenet21k_val")
_TEST_FOLDER = "test"  # neither for training nor for validation
_ARCHIVES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
_NO_FILE = "refused: a link, a device, or packed with holes"
LINKED_FOLDER = "a link to a folder, which is not followed"
TO_READ = "fetch it to this machine, or mount it, and name its path."
_NOTED = 1000
_SMALL_CLASSES = "imagenet21k_small_classes"  # in the same archive, but not part of ImageNet-21K-P
_LAYOUTS = (
    "an archive of class archives (fall11_whole.tar, winter21_whole.tar.gz), a folder of class archives "
    "(n01440764.tar), an archive or a folder of class folders (n01440764/), or the processed ImageNet-21K-P of "
    "image-net.org (imagenet21k_train/, imagenet21k_val/)"
)


@dataclass(frozen=True, kw_only=True)
class ClassSource:
    """The images of one class: a folder, or ``num_bytes`` of a tar file from ``offset`` on.

    ``split`` is set if the source is already split. ``position`` is where it ends in the source, in bytes.
    ``spooled`` files belong to whoever processes the class, and are deleted afterwards.
    """

    wnid: str
    path: Path
    num_bytes: int
    position: int
    offset: int = 0
    split: str | None = None
    spooled: bool = False

    @property
    def name(self) -> str:
        """Unique within the source."""
        return self.wnid if self.split is None else f"{self.split}-{self.wnid}"


@dataclass(frozen=True, slots=True)
class Member:
    """One file of a class: ``size`` bytes of ``path`` from ``offset`` on; ``refused`` says why not to read it.

    ``inner`` is its path within the class, of which ``name`` is the last part.
    """

    name: str
    path: Path
    offset: int
    size: int
    refused: str | None = None
    inner: str = ""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of classes.

    ``classes(spool, wanted)`` yields them in stored order, without those for which ``wanted(name)`` is false; classes
    in a compressed archive are copied into the folder ``spool``. ``num_bytes`` is the total size. ``sequential``: it
    can only be read from the beginning. ``is_split``: its images are already divided. ``is_resized``: it is the
    processed ImageNet-21K-P. ``unused`` names what is neither a class nor in one; of an archive, once it was read.
    """

    classes: Callable[[Path, Callable[[str], bool]], Iterator[ClassSource]]
    num_bytes: int
    sequential: bool
    is_split: bool
    is_resized: bool
    unused: dict[str, None] = field(default_factory=dict)

    def check_split(self, one: ClassSource) -> None:
        """Check that a class is divided if others are.

        Raises:
            DataSourceError: Only one of both is.
        """
        if (one.split is not None) != self.is_split:
            raise DataSourceError(
                f"{one.wnid} is {'in' if one.split else 'beside'} the folders for training and validation ("
                f"{', '.join(_SPLIT_FOLDERS)}), other classes are not; put all of them into such folders, or none."
            )


def open_source(path: Path) -> Source:
    """Detect the layout of a path.

    Raises:
        DataSourceError: Nothing is there, or the layout is not a known one.
    """
    try:
        if path.is_dir():
            return _open_folder(path)
        if not path.exists():
            raise DataSourceError(f"{path} does not exist; name {_LAYOUTS}.")
    except OSError as error:
        raise DataSourceError(f"{error.filename or path} cannot be read: {error.strerror}.") from None
    try:
        with tar_stream(path) as (archive, raw):
            compressed = archive.fileobj is not raw
            # A tar made on a Mac may have a ._NAME before each NAME.
            seen = (member for member in members_of(archive) if not PurePosixPath(member.name).name.startswith("."))
            member = next((member for member in seen if member.isfile()), None)
        first, has_tests = member.name if member is not None else "", True
        if _place(first, has_tests=False) and not _place(first, has_tests=True):
            beside = _outside_tests(path)
            first, has_tests = beside or first, beside is not None
    except (DataSourceError, OSError) as error:
        raise DataSourceError(f"{path} is not a readable tar archive ({error}); name {_LAYOUTS}.") from None
    if member is None:
        raise DataSourceError(f"{path} is empty; name {_LAYOUTS}.")
    nested, above = first.endswith(".tar"), PurePosixPath(first).parts[:-1]
    place = functools.partial(_place, has_tests=has_tests)
    if not nested and place(first) is None and _SMALL_CLASSES not in above:
        raise DataSourceError(
            f"{path} begins with {first!r}, neither a class archive nor in a class folder; name {_LAYOUTS}."
        )
    if nested:
        classes = _compressed_nested if compressed else _plain_nested
    else:
        classes = functools.partial(_compressed_flat if compressed else _plain_flat, place)
    unused: dict[str, None] = {}
    is_small = not nested and _SMALL_CLASSES in above
    return Source(
        classes=lambda spool, wanted: classes(path, spool, wanted, unused),
        num_bytes=path.stat().st_size,
        sequential=compressed,
        is_split=is_small or (not nested and _split(above) is not None),
        is_resized=is_small or (not nested and any(part in _RESIZED for part in above)),
        unused=unused,
    )


def _outside_tests(path: Path) -> str | None:
    """The first file of an archive that is of a class, but not in a folder for tests; None if none is.

    Raises:
        CutOffError, OSError: It cannot be read up to there, so nobody knows.
    """
    of_archive: str | None = None  # which may be a stray one beside class folders
    try:
        with tar_stream(path) as (archive, _):
            for member in members_of(archive):
                parts = PurePosixPath(member.name).parts
                if member.isfile() and (_SMALL_CLASSES in parts or _place(member.name, has_tests=True)):
                    return member.name
                if member.isfile() and _class_of_archive(member.name) and _TEST_FOLDER not in parts:
                    of_archive = of_archive or member.name
    except CutOffError:
        if of_archive is None:
            raise
    return of_archive


def _class_of_archive(name: str) -> str | None:
    """The class of a class archive, by its name; None if it is none."""
    stem = PurePosixPath(name).name.removesuffix(".tar")
    return stem if name.endswith(".tar") and WNID_PATTERN.fullmatch(stem) else None


def read_members(source: ClassSource) -> Iterator[Member]:
    """The files of one class in stored order; :func:`member_reader` reads them.

    Raises:
        DataSourceError: The archive is damaged or ends too early; everything before that point was yielded.
    """
    if source.path.is_dir():
        yield from _folder_members(source.path)
        return
    try:
        with source.path.open("rb") as file:
            window = Window(file, source.offset, source.num_bytes)
            with tarfile.open(fileobj=window, mode="r:", tarinfo=Header) as archive:  # type: ignore[call-overload]
                for member in members_of(archive):
                    yield from _tar_member(source, member)
    except (tarfile.TarError, EOFError) as error:
        raise DataSourceError(f"the archive of {source.wnid} is damaged: {error}") from None
    except OSError as error:
        raise DataSourceError(f"the archive of {source.wnid} cannot be read: {first_line(error)}") from None


def _tar_member(source: ClassSource, member: tarfile.TarInfo) -> Iterator[Member]:
    if member.isdir():
        return
    inner = _inner(member.name)
    name = inner.rpartition("/")[2]
    offset = source.offset + member.offset_data
    if member.name.startswith("/") or ".." in member.name.split("/"):
        yield Member(member.name, source.path, offset, member.size, "refused: its path leaves its folder")
    elif not member.isreg():
        yield Member(member.name, source.path, offset, member.size, _NO_FILE)
    elif _is_image(name) and not any(map(is_hidden, inner.split("/"))):
        if member.issparse():
            yield Member(member.name, source.path, offset, member.size, _NO_FILE)
        else:
            yield Member(name, source.path, offset, member.size, inner=inner)


def _inner(name: str) -> str:
    """The path of a member within its class."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    above = [place for place, part in enumerate(parts[:-1]) if WNID_PATTERN.fullmatch(part)]
    return "/".join(parts[above[-1] + 1 :] if above else parts)


def _folder_members(folder: Path) -> Iterator[Member]:
    def unreadable(error: OSError) -> None:
        raise DataSourceError(f"{error.filename or folder} cannot be read: {error.strerror}") from None

    for parent, folders, names in os.walk(folder, onerror=unreadable):
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        above = Path(parent)
        for name in folders:
            if (above / name).is_symlink():
                yield Member((above / name).relative_to(folder).as_posix(), above / name, 0, 0, LINKED_FOLDER)
        for name in sorted(names):
            if not _is_image(name):
                continue
            path = above / name
            try:
                state = path.stat()
            except OSError:  # said when it is read
                yield Member(name, path, 0, 0, inner=path.relative_to(folder).as_posix())
                continue
            if stat.S_ISREG(state.st_mode):
                yield Member(name, path, 0, state.st_size, inner=path.relative_to(folder).as_posix())
            else:
                yield Member(name, path, 0, 0, "refused: a pipe or device, not a file")


def is_readable(source: ClassSource) -> bool:
    """Whether all names of a class can be read; a copy that was made of it is deleted if not."""
    try:
        for _ in read_members(source):
            pass
    except DataSourceError:
        if source.spooled:
            source.path.unlink(missing_ok=True)
        return False
    return True


@contextlib.contextmanager
def member_reader() -> Iterator[Callable[[Member], bytes]]:
    """A function that returns a file's bytes; it keeps the last file open.

    It raises OSError if a file cannot be read or is cut off.
    """
    with contextlib.ExitStack() as stack:
        last: tuple[Path, IO[bytes]] | None = None

        def read(member: Member) -> bytes:
            nonlocal last
            if last is None or last[0] != member.path:
                stack.close()
                last = None
                last = member.path, stack.enter_context(member.path.open("rb"))
            last[1].seek(member.offset)
            data = last[1].read(member.size)
            if len(data) < member.size:
                raise OSError(f"{member.name} is cut off")
            return data

        yield read


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def _open_folder(path: Path) -> Source:
    unused: dict[str, None] = {}
    classes = list(_folder_classes(path, None, unused))
    if not classes:
        for name in [name for name in unused if name in _SPLIT_FOLDERS and (path / name).is_dir()]:
            del unused[name]
            classes += _folder_classes(path / name, _SPLIT_FOLDERS[name], unused)
    if not classes:
        inner = [entry for entry in path.iterdir() if entry.is_dir()]
        hint = f" Did you mean {inner[0]}?" if len(inner) == 1 else ""
        if len(inner) > 1:
            hint = " Folders of classes that are not named by wnids need no preparation: train on them directly."
        raise DataSourceError(f"{path} contains neither class archives nor class folders.{hint} Name {_LAYOUTS}.")
    _refuse_twice(classes)
    total = 0
    placed = []
    for one in classes:
        total += one.num_bytes
        placed.append(replace(one, position=total))
    return Source(
        classes=lambda spool, wanted: (one for one in placed if wanted(one.name)),
        num_bytes=total,
        sequential=False,
        is_split=classes[0].split is not None,
        is_resized=classes[0].split is not None and any((path / name).is_dir() for name in _RESIZED),
        unused=unused,
    )


def _folder_classes(folder: Path, split: str | None, unused: dict[str, None]) -> Iterator[ClassSource]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        stem = entry.name.removesuffix(".tar")
        is_class = WNID_PATTERN.fullmatch(stem) is not None
        path = Path(entry.path)
        if is_class and entry.is_dir() and stem == entry.name:
            size = sum(file.stat().st_size for _, file in files_below(entry.path))
        elif is_class and entry.is_file() and stem != entry.name:
            size = entry.stat().st_size
        else:
            is_other = not entry.is_file() or entry.name.lower().endswith(_ARCHIVES)  # a note is no class
            is_known = is_hidden(entry.name) or entry.name == _SMALL_CLASSES
            if is_other and not is_known and not is_prepared(path):  # such as the output itself
                unused[entry.name if split is None else f"{folder.name}/{entry.name}"] = None
            continue
        yield ClassSource(wnid=stem, path=path, num_bytes=size, position=0, split=split)


def files_below(folder: str | os.PathLike[str]) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """The files below a folder, with their relative paths; without a stat of each: there may be millions.

    Links to files are followed; links to folders and what may not be read are skipped.
    """
    with contextlib.suppress(PermissionError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from ((f"{entry.name}/{name}", file) for name, file in files_below(entry.path))
                continue
            with contextlib.suppress(OSError):  # a circular link
                if entry.is_file():
                    yield entry.name, entry


def _refuse_twice(classes: list[ClassSource]) -> None:
    seen: dict[str, Path] = {}
    for one in classes:
        if one.name in seen:
            raise DataSourceError(f"{one.wnid} is there twice, {seen[one.name]} and {one.path}; remove one of them.")
        seen[one.name] = one.path


_Place = tuple[str, str | None]


def _place(name: str, has_tests: bool) -> _Place | None:
    """Class and split of a member of an archive of class folders; None if it is in no class folder that is read.

    With ``has_tests`` the classes in a folder of that name are for tests, beside others.
    """
    parts = PurePosixPath(name).parts
    if _SMALL_CLASSES in parts:
        return None
    for position in range(len(parts) - 2, -1, -1):
        if WNID_PATTERN.fullmatch(parts[position]):
            is_left_out = has_tests and _is_test(parts[: position + 1])
            return (parts[position], _split(parts[:position])) if not is_left_out else None
    return None


def _is_test(folders: tuple[str, ...]) -> bool:
    """Whether the last folder is that of a class in a folder ``test``."""
    return folders[-2:-1] == (_TEST_FOLDER,) and WNID_PATTERN.fullmatch(folders[-1]) is not None


def _split(folders: tuple[str, ...]) -> str | None:
    return next((_SPLIT_FOLDERS[part] for part in folders if part in _SPLIT_FOLDERS), None)


def _note_unused(member: tarfile.TarInfo, unused: dict[str, None]) -> None:
    """Note the folder of an image or archive that is not of a class."""
    parts = PurePosixPath(member.name).parts
    if not parts or _SMALL_CLASSES in parts or any(map(is_hidden, parts)) or len(unused) >= _NOTED:
        return
    if parts[-1].lower().endswith(_ARCHIVES) or (_is_image(parts[-1]) and len(parts) == 1):
        unused[member.name] = None
    elif _is_image(parts[-1]):
        unused["/".join(parts[: -2 if _is_test(parts[:-1]) else -1])] = None


def _plain_nested(
    path: Path, spool: Path, wanted: Callable[[str], bool], unused: dict[str, None]
) -> Iterator[ClassSource]:
    """The class archives of an uncompressed archive, by their offsets."""
    del spool
    size = path.stat().st_size
    seen: set[str] = set()
    for member, next_header in _headers(path):
        stem = _class_of_archive(member.name)
        if stem is not None:
            _refuse_sparse(member, path)
        end = next_header if member.issparse() else member.offset_data + member.size
        if end > size:
            raise CutOffError(f"{path} ends within {member.name}: it was not fetched whole.")
        if member.isreg() and stem is not None:
            _refuse_scattered(stem, seen, path)
            if wanted(stem):
                yield ClassSource(wnid=stem, path=path, num_bytes=member.size, position=end, offset=member.offset_data)
        else:
            _note_unused(member, unused)


def _plain_flat(
    place_of: Callable[[str], _Place | None],
    path: Path,
    spool: Path,
    wanted: Callable[[str], bool],
    unused: dict[str, None],
) -> Iterator[ClassSource]:
    """The consecutive files of each class in an uncompressed archive of class folders."""
    del spool
    size = path.stat().st_size
    seen: set[str] = set()
    place: _Place | None = None
    begin = end = 0

    def run() -> Iterator[ClassSource]:
        if place is not None:
            one = ClassSource(
                wnid=place[0], split=place[1], path=path, num_bytes=end - begin, position=end, offset=begin
            )
            _refuse_scattered(one.name, seen, path)
            if wanted(one.name):
                yield one

    for member, next_header in _headers(path):
        if not member.isdir():
            here = place_of(member.name)
            if here is None:
                _note_unused(member, unused)
            if here != place:
                yield from run()
                place, begin = here, member.offset
        end = next_header
        if end > size:
            raise CutOffError(f"{path} ends within {member.name}: it was not fetched whole.")
    yield from run()


def _refuse_scattered(name: str, seen: set[str], path: Path) -> None:
    if name in seen:
        raise DataSourceError(
            f"{path} has the files of {name} in several places; unpack it and name the folder instead."
        )
    seen.add(name)


def _refuse_sparse(member: tarfile.TarInfo, path: Path) -> None:
    """Refuse a class archive with holes: a few bytes may stand for a whole disk of zeros."""
    if member.issparse():
        raise DataSourceError(f"{path}: {member.name} was packed with holes (tar --sparse); pack it anew without.")


def _headers(path: Path) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each header, and where the next one begins."""
    try:
        with tarfile.open(path, mode="r:", tarinfo=Header) as archive:
            yield from ((member, archive.offset) for member in members_of(archive))
    except tarfile.TarError as error:
        raise CutOffError(f"{path} is damaged or was not fetched whole: {error}.") from None
    except OSError as error:
        raise CutOffError(f"{path} cannot be read: {first_line(error)}.") from None


def _compressed_nested(
    path: Path, spool: Path, wanted: Callable[[str], bool], unused: dict[str, None]
) -> Iterator[ClassSource]:
    """The class archives of a compressed archive, each copied out in turn."""
    seen: set[str] = set()
    with tar_stream(path) as (archive, raw):
        for member in members_of(archive):
            stem = _class_of_archive(member.name)
            if stem is None or not member.isreg():
                _note_unused(member, unused)
                continue
            _refuse_scattered(stem, seen, path)
            if not wanted(stem):
                continue
            _refuse_sparse(member, path)
            file: Any = archive.extractfile(member)
            copy = spool / f"{stem}.tar"
            size = 0
            with copy.open("wb") as out:
                while chunk := file.read(1 << 20):
                    size += out.write(chunk)
            yield ClassSource(wnid=stem, path=copy, num_bytes=size, position=raw.tell(), spooled=True)


def _compressed_flat(
    place_of: Callable[[str], _Place | None],
    path: Path,
    spool: Path,
    wanted: Callable[[str], bool],
    unused: dict[str, None],
) -> Iterator[ClassSource]:
    """The consecutive files of each class in a compressed archive of class folders, each class copied out in turn."""
    seen: set[str] = set()
    with tar_stream(path) as (archive, raw), contextlib.ExitStack() as copies:
        place: _Place | None = None
        copy: tarfile.TarFile | None = None

        def finish() -> Iterator[ClassSource]:
            if copy is None or place is None:
                return
            copies.close()
            file = Path(str(copy.name))
            yield ClassSource(
                wnid=place[0],
                split=place[1],
                path=file,
                num_bytes=file.stat().st_size,
                position=raw.tell(),
                spooled=True,
            )

        for member in members_of(archive):
            if member.isdir():
                continue
            here = place_of(member.name)
            if here is None:
                _note_unused(member, unused)
            if here != place:
                yield from finish()
                place, copy = here, None
                if here is not None:
                    one = ClassSource(wnid=here[0], split=here[1], path=path, num_bytes=0, position=0)
                    _refuse_scattered(one.name, seen, path)
                    if wanted(one.name):
                        copy = copies.enter_context(tarfile.open(spool / f"{one.name}.tar", "w:"))
            if copy is not None:
                if member.issparse():  # a few bytes may stand for a whole disk of zeros; as a link it is refused later
                    is_image = _is_image(PurePosixPath(member.name).name)
                    member = tarfile.TarInfo(member.name)
                    member.type = tarfile.SYMTYPE if is_image else tarfile.REGTYPE
                copy.addfile(member, archive.extractfile(member) if member.isreg() else None)
        yield from finish()
