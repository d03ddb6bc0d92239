"""All errors that this package raises on purpose.

The message is one line that says what is wrong and what to do next; the class says what kind of problem it is::

    Wn21kError
    ├── InvalidArgumentError (ValueError)       an argument with a value that is not allowed
    ├── UnknownNameError (LookupError)          an unknown name; the message gives the nearest ones
    │   ├── UnknownModelError
    │   ├── UnknownLabelSpaceError
    │   ├── UnknownTreeError
    │   └── UnknownSynsetError                  not a noun synset of WordNet 3.0, or not in this tree
    ├── LabelSpaceError (ValueError)            a list of classes that cannot be used
    │   ├── EmptyLabelSpaceError
    │   ├── DuplicateSynsetError
    │   └── UnresolvedLabelSpaceError           the classes of a model's head are not known
    ├── TreeError (ValueError)                  a tree file that cannot be read, a tree that does not fit
    ├── ImageError (ValueError)                 something that is not a usable image
    │   ├── ImageNotFoundError (FileNotFoundError)
    │   ├── ImageDecodeError                    truncated, empty, not an image
    │   ├── ImageTooLargeError
    │   ├── ImageURLError                       not allowed, not public, too slow, too large
    │   └── UnsupportedImageError               an ambiguous type, shape or value range
    ├── RecordError (ValueError)                an invalid record or lock file
    ├── ModelError (RuntimeError)               a model that cannot be built, loaded or run
    │   ├── WeightsNotFoundError
    │   │   └── OfflineError                    a download is needed, but the network is off
    │   ├── ChecksumError                       the bytes are not the published ones
    │   ├── ConversionError                     a file whose entries are not those of a known layout
    │   ├── CacheError                          the cache cannot be read or written, or is full
    │   ├── DownloadError                       a server that fails, stalls or cannot be reached
    │   │   ├── AuthenticationError             401: log in
    │   │   ├── AccessDeniedError               403: accept the terms, or ask for access
    │   │   └── RemoteNotFoundError             404: no such repository, revision or file
    │   └── PublishError
    ├── DataError (RuntimeError)                a data set that cannot be prepared or read
    │   ├── DataSourceError                     nothing to prepare images from, or a damaged archive
    │   ├── DataOutputError                     a folder that holds something else, or was begun with other options
    │   ├── DiskSpaceError                      too little space, found beforehand or while writing
    │   └── BadImagesError                      more damaged images than allowed
    ├── TrainingError (RuntimeError)            a run that cannot start or continue
    │   ├── RecipeError (ValueError)            an unknown field, a wrong value, an impossible combination
    │   ├── RunError                            an output folder with no run, another one, or a damaged one
    │   └── NonFiniteError                      a loss or logits that are NaN or infinite
    └── MissingExtraError (ImportError)         names the extra to install
"""

from __future__ import annotations

import difflib
import errno
import numbers
import operator
import os
import re
from collections.abc import Iterable, Iterator
from typing import Any

__all__ = [
    "AccessDeniedError",
    "AuthenticationError",
    "BadImagesError",
    "CacheError",
    "ChecksumError",
    "ConversionError",
    "DataError",
    "DataOutputError",
    "DataSourceError",
    "DiskSpaceError",
    "DownloadError",
    "DuplicateSynsetError",
    "EmptyLabelSpaceError",
    "ImageDecodeError",
    "ImageError",
    "ImageNotFoundError",
    "ImageTooLargeError",
    "ImageURLError",
    "InvalidArgumentError",
    "LabelSpaceError",
    "MissingExtraError",
    "ModelError",
    "NonFiniteError",
    "OfflineError",
    "PublishError",
    "RecipeError",
    "RecordError",
    "RemoteNotFoundError",
    "RunError",
    "TrainingError",
    "TreeError",
    "UnknownLabelSpaceError",
    "UnknownModelError",
    "UnknownNameError",
    "UnknownSynsetError",
    "UnknownTreeError",
    "UnresolvedLabelSpaceError",
    "UnsupportedImageError",
    "WeightsNotFoundError",
    "Wn21kError",
    "causes_of",
    "check_share",
    "did_you_mean",
    "first_line",
    "is_out_of_memory",
    "message_of",
    "whole_number",
    "without_login",
]


class Wn21kError(Exception):
    """Base class: ``except Wn21kError`` catches everything that this package raises on purpose.

    Attributes:
        exit_code: Exit code of a command that ends with it: 2 for arguments and recipes with values that are not
            allowed, else 1, also for names and files that do not exist.
    """

    exit_code = 1

    def __str__(self) -> str:
        """The message without names and passwords in URLs, as messages go into logs."""
        return without_login(super().__str__())


def without_login(text: str) -> str:
    """Remove names and passwords from the URLs in a text."""
    return re.sub(r"(?<=://)[^/?#\s]*@", "", text)


class InvalidArgumentError(Wn21kError, ValueError):
    """An argument has a value that is not allowed."""

    exit_code = 2


class UnknownNameError(Wn21kError, LookupError):
    """An unknown name."""


class UnknownModelError(UnknownNameError):
    """Neither a record, nor a timm model, nor a folder, nor a Hub repository."""


class UnknownLabelSpaceError(UnknownNameError):
    """No label space of this name is shipped."""


class UnknownTreeError(UnknownNameError):
    """No semantic tree of this name is shipped."""


class UnknownSynsetError(UnknownNameError):
    """Not a noun synset of WordNet 3.0, or not a node of the tree in question."""


class LabelSpaceError(Wn21kError, ValueError):
    """A list of classes that cannot be used."""


class EmptyLabelSpaceError(LabelSpaceError):
    """A list of classes with nothing in it."""


class DuplicateSynsetError(LabelSpaceError):
    """The same synset appears twice in a list of classes."""


class UnresolvedLabelSpaceError(LabelSpaceError):
    """The classes of a model's head are not known, and they are not guessed."""


class TreeError(Wn21kError, ValueError):
    """A tree file that cannot be read, or a tree that does not fit a model's head."""


class ImageError(Wn21kError, ValueError):
    """Something that is not a usable image."""


class ImageNotFoundError(ImageError, FileNotFoundError):
    """No file at that path."""


class ImageDecodeError(ImageError):
    """A file that no image decoder accepts: truncated, empty, or not an image."""


class ImageTooLargeError(ImageError):
    """More pixels or bytes than the limit; nothing was decoded."""


class ImageURLError(ImageError):
    """A URL that may not, or could not, be fetched."""


class UnsupportedImageError(ImageError):
    """A type, shape, data type or value range with no single interpretation as an image."""


class RecordError(Wn21kError, ValueError):
    """An invalid record or lock file."""


class ModelError(Wn21kError, RuntimeError):
    """A model that cannot be built, loaded or run."""


class WeightsNotFoundError(ModelError):
    """The weights are not on this machine and could not be obtained."""


class OfflineError(WeightsNotFoundError):
    """Something must be downloaded, but the network is switched off."""


class ChecksumError(ModelError):
    """The bytes of a checkpoint are not the published ones; they were not loaded."""


class ConversionError(ModelError):
    """A weight file that is not a plain state dict, or whose entries are not those of a known layout."""


class CacheError(ModelError):
    """The cache cannot be read or written, or its disk has too little space."""


class DownloadError(ModelError):
    """A download that failed."""


class AuthenticationError(DownloadError):
    """The server requires a login (HTTP 401)."""


class AccessDeniedError(DownloadError):
    """The server knows the user and refuses access (HTTP 403)."""


class RemoteNotFoundError(DownloadError):
    """The server has no such repository, revision or file (HTTP 404)."""


class PublishError(ModelError):
    """A folder that cannot be published, or that the Hub does not accept."""


class DataError(Wn21kError, RuntimeError):
    """A data set that cannot be prepared or read."""


class DataSourceError(DataError):
    """Nothing to prepare images from, or a damaged archive."""


class DataOutputError(DataError):
    """An output folder that holds something else, or was begun with other options."""


class DiskSpaceError(DataError):
    """Too little disk space for the output."""


class BadImagesError(DataError):
    """More damaged images than allowed."""


class TrainingError(Wn21kError, RuntimeError):
    """A run that cannot start or continue."""


class RecipeError(TrainingError, ValueError):
    """A recipe with an unknown field, a wrong value or an impossible combination."""

    exit_code = 2


class RunError(TrainingError):
    """An output folder with no run where one is needed, with another one, or with a damaged one."""


class NonFiniteError(TrainingError):
    """A loss or logits that are NaN or infinite."""


class MissingExtraError(Wn21kError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f'{what} needs an extra: pip install "wn21k-zoo[{extra}]"')
        self.what, self.extra = what, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.what, self.extra)


_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """' Did you mean a, b?' for the candidates nearest to ``name``, or '' when none is near."""
    by_folded = {candidate.lower(): candidate for candidate in candidates}
    folded = name.lower()
    near = difflib.get_close_matches(folded, by_folded, n=3, cutoff=0.6)
    if not near and len(folded) >= 4:  # the beginning of a long name, perhaps mistyped; else a part of one
        beginnings = {known[: len(folded) + 1]: known for known in by_folded}
        near = [beginnings[match] for match in difflib.get_close_matches(folded, beginnings, n=3, cutoff=0.75)]
        near = near or sorted((known for known in by_folded if folded in known), key=len)[:3]
    return f" Did you mean {', '.join(by_folded[known] for known in near)}?" if near else ""


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return an argument as a Python int if it is a whole number (also NumPy's) within bounds.

    Raises:
        InvalidArgumentError: It is not.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        bounds = f"from {least} to {most}" if most is not None else f"{least} or more"
        raise InvalidArgumentError(f"{name} is {value!r}; it must be a whole number, {bounds}.")
    return number


def check_share(name: str, value: float) -> float:
    """Return an argument as a Python float if it is a number from 0 to 1.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise InvalidArgumentError(f"{name} is {value!r}; it must be a number from 0 to 1.")
    return float(value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device ran out of memory; for MPS, the CPU, cuBLAS and cuDNN, only torch's message tells."""
    libraries = ("_STATUS_ALLOC_FAILED", "_ALLOCATION_FAILED")  # the latter are cuDNN's since version 9
    said = ("out of memory", "can't allocate memory", "not enough memory", *libraries)
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, Wn21kError)
        and any(words in str(error) for words in said)
    )


_ADVICE = {
    errno.EACCES: "ask its owner, or name another place",
    errno.EROFS: "name another place",
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room in your quota",
    errno.ESTALE: "try again; it changed on the server",
}


def message_of(error: Exception) -> str | None:
    """Return the line that a command prints for an error; None for an unexpected one."""
    if isinstance(error, Wn21kError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:  # such as a name too long, a full disk
        name = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
        advice = f"; {_ADVICE[error.errno]}" if error.errno in _ADVICE else ""
        return f"{name}: {error.strerror}{advice}" if name is not None else f"{error.strerror}{advice}"
    return None


def first_line(error: BaseException) -> str:
    """Summarise another library's error in one line, for use in our messages."""
    lines = [line for line in _COLOUR.sub("", str(error)).strip().splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):  # as in torch's, of weights that do not fit
        lines[0] += f" {lines[1].strip():.160}"
    return f"{type(error).__name__}: {lines[0]:.2000}" if lines else type(error).__name__


def causes_of(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all that are behind it, as requests and urllib3 wrap them."""
    found = [error]
    for each in found:  # which grows
        yield each
        parts = (*each.args, getattr(each, "reason", None), each.__cause__)
        found += [part for part in parts if isinstance(part, BaseException) and part not in found]
