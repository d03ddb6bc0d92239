"""Tar files of others, compressed or not: their headers, their ends, and what is wrong with them."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from wn21k_zoo.errors import DataSourceError

__all__ = ["CorruptError", "CutOffError", "Header", "Window", "members_of", "tar_stream"]

_ABOUT_THE_NEXT = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE
)  # fmt: skip
_PADDING = 64 << 20  # bytes; tar pads an archive to a block, of 10 KiB unless told otherwise
_EMPTY = 1 << 16  # bytes of zeros that may be an archive of nothing


class CutOffError(DataSourceError):
    """The source ends too early or is damaged somewhere; everything before that point was yielded."""


class CorruptError(CutOffError):
    """A checksum or the compression is wrong, so what was yielded may be, too."""


class Header(tarfile.TarInfo):
    """A header of an untrusted archive, for ``tarfile.open(tarinfo=)``."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Header:
        """Refuse what is no header, or not a whole one, which tarfile takes for the end of the archive.

        Raises:
            tarfile.ReadError: It is not.
        """
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError):  # type: ignore[attr-defined]
            raise tarfile.ReadError("there is no header where one should be") from None

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:  # the hook that tarfile has for subclasses
        """Refuse sizes below 0, and what describes the next header, such as its long name, beyond a megabyte.

        Tarfile reads the latter whole. With the former it loops forever, or since Python's CVE-2025-8194 was mended
        takes them for the end of the archive.

        Raises:
            tarfile.ReadError: The size is such a one, or more headers describe one member than Python's recursion
                limit.
        """
        if self.size < 0 or (self.type in _ABOUT_THE_NEXT and self.size > 1 << 20):
            raise tarfile.ReadError(f"a header has {self.size:,} bytes")
        try:
            found: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        except RecursionError:
            raise tarfile.ReadError("too many headers describe one member") from None
        except (tarfile.HeaderError, ValueError, IndexError) as error:  # the latter of where a sparse file has data
            raise tarfile.ReadError(str(error)) from None
        if not 0 <= found.size < 1 << 60:  # as another header says
            raise tarfile.ReadError(f"a header has {found.size:,} bytes")
        return found


def members_of(archive: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """All headers of an archive without keeping them.

    Raises:
        tarfile.ReadError: It ends too early, or at something that is not a header, which tarfile takes for the end; or
            in zeros, as files do that were given their size before they were fetched.
    """
    is_empty = True
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]
        is_empty = False
        yield member
    file: Any = archive.fileobj
    is_stream = not hasattr(file, "seekable")  # which cannot go back
    if not is_stream:
        file.seek(archive.offset)
    rest, length = b"", 0
    while chunk := file.read(1 << 20):
        if not rest and chunk.strip(b"\0"):
            rest = chunk
        length += len(chunk)
        if (rest or length > _PADDING) and not is_stream:  # a compressed one has its checksum at the end
            break
    if rest and (length > tarfile.RECORDSIZE or b"ustar" in rest):  # else what was in memory when the end was padded
        raise tarfile.ReadError("something stands behind its end: it has a hole, or is several archives in one file")
    if length > (_EMPTY if is_empty else _PADDING):
        raise tarfile.ReadError("it ends in zeros")


@contextlib.contextmanager
def tar_stream(path: Path) -> Iterator[tuple[tarfile.TarFile, IO[bytes]]]:
    """An archive read from its beginning, and the underlying file, whose position tells the progress."""
    try:
        with path.open("rb") as raw:
            magic = raw.read(6)
            raw.seek(0)
            file: Any = raw
            if magic.startswith(b"\x1f\x8b"):
                file = gzip.open(raw)  # noqa: SIM115
            elif magic.startswith(b"BZh"):
                file = bz2.open(raw)  # noqa: SIM115
            elif magic.startswith(b"\xfd7zXZ"):
                file = lzma.open(raw)  # noqa: SIM115
            with tarfile.open(fileobj=file, mode="r|" if file is not raw else "r:", tarinfo=Header) as archive:
                try:
                    yield archive, raw
                except tarfile.TarError:
                    while file is not raw and file.read(1 << 20):  # to the checksum, which may say that more is wrong
                        pass
                    raise
    except (EOFError, tarfile.TarError) as error:
        raise CutOffError(f"{path} is damaged or was not fetched whole: {error}") from None
    except (zlib.error, lzma.LZMAError) as error:
        raise CorruptError(f"{path} is damaged: {error}") from None
    except OSError as error:
        if error.errno is not None:
            raise
        # Bz2 checks each block before it gives it out; and what stands behind a gzip file has no header.
        is_checksum = isinstance(error, gzip.BadGzipFile) and not str(error).startswith("Not a gzipped file")
        raise (CorruptError if is_checksum else CutOffError)(f"{path} is damaged: {error}") from None


class Window:
    """A part of a file that tarfile takes for a whole file; it has only the methods that tarfile calls."""

    def __init__(self, file: IO[bytes], offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._position = file, offset, size, 0

    def read(self, count: int) -> bytes:
        """Read up to that many bytes."""
        self._file.seek(self._offset + self._position)
        data = self._file.read(max(0, min(count, self._size - self._position)))
        self._position += len(data)
        return data

    def seek(self, position: int) -> None:
        """Go to a position in the part."""
        self._position = position

    def tell(self) -> int:
        """Return the position in the part."""
        return self._position

    def seekable(self) -> bool:
        """Whether it can go back."""
        return True
