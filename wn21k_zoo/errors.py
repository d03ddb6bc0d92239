"""Every error that this package raises on purpose.

One line of text that says what is wrong and what to do next; the class says what kind of thing went wrong::

    Wn21kError
    ├── InvalidArgumentError (ValueError)       an argument outside its allowed values
    ├── UnknownNameError (LookupError)          a name that nothing answers to, with the nearest ones
    │   ├── UnknownModelError
    │   ├── UnknownLabelSpaceError
    │   ├── UnknownTreeError
    │   └── UnknownSynsetError                  not a noun synset of WordNet 3.0, or not in this tree
    ├── LabelSpaceError (ValueError)            a list of classes that cannot be used
    │   ├── EmptyLabelSpaceError
    │   ├── DuplicateSynsetError
    │   └── UnresolvedLabelSpaceError           nobody says which classes a model's head speaks
    ├── TreeError (ValueError)                  a tree file that cannot be read, a tree that does not fit
    ├── ImageError (ValueError)                 something that is not a usable image
    │   ├── ImageNotFoundError (FileNotFoundError)
    │   ├── ImageDecodeError                    truncated, empty, not an image
    │   ├── ImageTooLargeError
    │   ├── ImageURLError                       not allowed, not public, too slow, too large
    │   └── UnsupportedImageError               a type, shape or value range that has no one reading
    ├── RecordError (ValueError)                a record or a lock file that cannot be right
    ├── ModelError (RuntimeError)               a model that cannot be built, loaded or run
    │   ├── WeightsNotFoundError
    │   │   └── OfflineError                    needed from the network, which is switched off
    │   ├── ChecksumError                       the bytes are not the published ones
    │   ├── ConversionError                     a file whose entries are not those of a known layout
    │   ├── CacheError                          the cache cannot be written, or its disk is full
    │   ├── DownloadError                       a server that fails, stalls or cannot be reached
    │   │   ├── AuthenticationError             401: log in
    │   │   ├── AccessDeniedError               403: accept the terms, or ask for access
    │   │   └── RemoteNotFoundError             404: no such repository, revision or file
    │   └── PublishError
    ├── DataError (RuntimeError)                a data set that cannot be prepared or read
    │   ├── DataSourceError                     nothing that images are prepared from, or a damaged archive
    │   ├── DataOutputError                     a folder that holds something else, or was begun otherwise
    │   ├── DiskSpaceError                      too little space, known beforehand or met on the way
    │   └── BadImagesError                      more damaged images than allowed
    ├── TrainingError (RuntimeError)            a run that cannot begin or go on
    │   ├── RecipeError (ValueError)            an unknown field, a wrong value, an impossible combination
    │   ├── RunError                            an output folder without, or with another, or a damaged run
    │   └── NonFiniteError                      NaN or infinite numbers where a loss should be
    └── MissingExtraError (ImportError)         names the extra to install
"""

from __future__ import annotations

import difflib
import numbers
import operator
import re
from collections.abc import Iterable
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
    "check_share",
    "did_you_mean",
    "exit_code_of",
    "first_line",
    "is_out_of_memory",
    "message_of",
    "whole_number",
    "without_login",
]


class Wn21kError(Exception):
    """Base class: ``except Wn21kError`` catches everything that this package raises on purpose.

    Attributes:
        exit_code: Of a command that ends with it: 2 for what its user wrote, else 1.
    """

    exit_code = 1

    def __str__(self) -> str:
        """Without the name and password that a URL in it may have: messages go into logs."""
        return without_login(super().__str__())


def without_login(text: str) -> str:
    """The same without the names and passwords of URLs in it."""
    return re.sub(r"(?<=://)[^/\s@]*@", "", text)


class InvalidArgumentError(Wn21kError, ValueError):
    """An argument has a value that is not allowed."""

    exit_code = 2


class UnknownNameError(Wn21kError, LookupError):
    """A name that nothing answers to."""


class UnknownModelError(UnknownNameError):
    """Neither a record, nor a timm model, nor a folder, nor a Hub repository."""


class UnknownLabelSpaceError(UnknownNameError):
    """No label space of this name is shipped."""


class UnknownTreeError(UnknownNameError):
    """No semantic tree of this name is shipped."""


class UnknownSynsetError(UnknownNameError):
    """Not a noun synset of WordNet 3.0, or not a node of the tree that was asked."""


class LabelSpaceError(Wn21kError, ValueError):
    """A list of classes that cannot be used."""


class EmptyLabelSpaceError(LabelSpaceError):
    """A list of classes with nothing in it."""


class DuplicateSynsetError(LabelSpaceError):
    """The same synset stands twice in one list of classes."""


class UnresolvedLabelSpaceError(LabelSpaceError):
    """Which classes a model's head speaks is not known, and is not guessed."""


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
    """A type, shape, data type or value range that has no single reading as an image."""


class RecordError(Wn21kError, ValueError):
    """A record or a lock file that cannot be right."""


class ModelError(Wn21kError, RuntimeError):
    """A model that cannot be built, loaded or run."""


class WeightsNotFoundError(ModelError):
    """The weights are not on this machine and could not be had."""


class OfflineError(WeightsNotFoundError):
    """Something that is needed from the network, which is switched off."""


class ChecksumError(ModelError):
    """The bytes of a checkpoint are not the published ones; they were not loaded."""


class ConversionError(ModelError):
    """A weight file that is no plain state dict, or whose entries are not those of a known layout."""


class CacheError(ModelError):
    """The cache cannot be written, or its disk has too little space."""


class DownloadError(ModelError):
    """A download that did not succeed."""


class AuthenticationError(DownloadError):
    """The server wants to know who asks (HTTP 401)."""


class AccessDeniedError(DownloadError):
    """The server knows who asks and refuses (HTTP 403)."""


class RemoteNotFoundError(DownloadError):
    """The server has no such repository, revision or file (HTTP 404)."""


class PublishError(ModelError):
    """A folder that cannot be published, or a Hub that does not take it."""


class DataError(Wn21kError, RuntimeError):
    """A data set that cannot be prepared or read."""


class DataSourceError(DataError):
    """Nothing that images can be prepared from, or an archive that is damaged."""


class DataOutputError(DataError):
    """An output folder that holds something else, or was begun with other options."""


class DiskSpaceError(DataError):
    """Too little space for what is to be written."""


class BadImagesError(DataError):
    """More damaged images than allowed."""


class TrainingError(Wn21kError, RuntimeError):
    """A run that cannot begin or go on."""


class RecipeError(TrainingError, ValueError):
    """A recipe with an unknown field, a wrong value, or values that do not go together."""

    exit_code = 2


class RunError(TrainingError):
    """An output folder that holds no run where one is needed, another one, or a damaged one."""


class NonFiniteError(TrainingError):
    """NaN or infinite numbers where a loss should be."""


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
    """An argument as Python's integer, where it is a whole number within bounds, NumPy's also.

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
    """An argument as Python's float, where it is a number from 0 to 1.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= value <= 1:
        raise InvalidArgumentError(f"{name} is {value!r}; it must be a number from 0 to 1.")
    return float(value)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device has no memory left; of MPS and the CPU torch says so in words only."""
    return (
        isinstance(error, RuntimeError)
        and not isinstance(error, Wn21kError)
        and any(words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory"))
    )


def message_of(error: Exception) -> str | None:
    """What a command says of an error in one line; None of one that nobody expects."""
    if isinstance(error, Wn21kError):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:  # a name too long, a disk that is full
        return f"{error.filename}: {error.strerror}" if error.filename is not None else str(error.strerror)
    return None


def exit_code_of(error: Exception) -> int:
    """Of a command that ends with an error of any kind."""
    return error.exit_code if isinstance(error, Wn21kError) else 1


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line, for use inside ours."""
    lines = _COLOUR.sub("", str(error)).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
