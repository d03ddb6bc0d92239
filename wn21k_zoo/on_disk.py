"""Find and verify weights that are already on this machine; opens no connection and writes nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from wn21k_zoo import cache, hub
from wn21k_zoo.checkpoints import CHECKPOINTS, Checkpoint, HubSource, PackageSource, Source, URLSource
from wn21k_zoo.errors import ChecksumError, MissingExtraError
from wn21k_zoo.files import in_package, sha256_of
from wn21k_zoo.transfer import Expected, difference

__all__ = [
    "UNKNOWN",
    "Cached",
    "Damage",
    "Fetched",
    "Remote",
    "cached_files",
    "contents",
    "filenames_of",
    "find_file",
    "find_local",
    "find_verified",
    "stated",
]

Remote = HubSource | URLSource
UNKNOWN = "nothing states its hash: its receipt is missing"
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A verified file on this machine.

    Attributes:
        path: The file.
        sha256: Hash of its content.
        num_bytes: Its size.
        checked_against: Who stated the hash it was compared with; None if nobody did.
        downloaded: Whether it was fetched just now.
    """

    path: Path
    sha256: str
    num_bytes: int
    checked_against: str | None
    downloaded: bool


class Damage(NamedTuple):
    """A file that does not have the right hash, or that cannot be read, and what is wrong with it."""

    path: Path
    problem: str
    status: Literal["damaged", "unreadable"] = "damaged"

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


@dataclass(frozen=True, kw_only=True)
class Cached:
    """A file in the cache: one that has a receipt, or that lies where a record's file belongs.

    Attributes:
        path: The file.
        source: Key of the source it comes from.
        receipt: Its receipt, if it has a readable one.
        expected: What it is compared with.
    """

    path: Path
    source: str
    receipt: cache.Receipt | None
    expected: Expected

    def status(self) -> tuple[Literal["ok", "damaged", "unreadable", "missing", "unknown"], str]:
        """Hash the file.

        Returns:
            Its status, and what is wrong if it is not ``ok``: it is ``unknown`` if there is nothing to compare it with.
        """
        if not self.path.is_file():
            return "missing", "only its receipt is there"
        if not self.expected.hash:
            return "unknown", UNKNOWN
        compared = _compare(self.path, self.expected)
        return (compared.status, compared.problem) if isinstance(compared, Damage) else ("ok", "")


@cache.readable()
def find_verified(
    checkpoint: Checkpoint, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[Fetched | None, list[Damage]]:
    """Find the weight file of a checkpoint on this machine if it has the right hash; opens no connection.

    Returns:
        The file or None, and what is wrong with local files that do not have the right hash.

    Raises:
        ChecksumError: A file in a Python package is not the published one.
        MissingExtraError: That package is not installed.
        CacheError: The cache may not be read.
    """
    damages: list[Damage] = []
    for source in checkpoint.sources:
        if isinstance(source, PackageSource):
            return _from_package(source), damages
        root = cache.cache_dir(cache_dir)
        for filename in filenames_of(source):
            if (found := find_file(source, filename, root, damages)) is not None:
                return found, damages
    return None, damages


@cache.readable()
def find_local(checkpoint: Checkpoint, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Find readable weights of a checkpoint on this machine, without verifying them; opens no connection."""
    for source in checkpoint.sources:
        if isinstance(source, PackageSource):
            return in_package(source.package, source.path)
        root = cache.cache_dir(cache_dir)
        for filename in filenames_of(source):
            for path, _ in _candidates(source, filename, root):
                if os.access(path, os.R_OK):
                    return path
    return None


@cache.readable()
def cached_files(sources: Iterable[Source], cache_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """List the files of some sources that are in our cache, or at least have a receipt there."""
    root = cache.cache_dir(cache_dir)
    places = [
        root / cache.relative_path(source, filename)
        for source in sources
        if not isinstance(source, PackageSource)
        for filename in filenames_of(source)
    ]
    return [place for place in places if place.is_file() or cache.receipt_path(place).is_file()]


def contents(root: Path) -> list[Cached]:
    """List the files in a cache folder that have a receipt, even if they are gone, or lie where a record's belong.

    Anything else there may not be ours.
    """
    of_records = {
        root / cache.relative_path(source, filename): (source.key, stated(source, filename))
        for checkpoint in CHECKPOINTS
        for source in checkpoint.sources
        if not isinstance(source, PackageSource)
        for filename in filenames_of(source)
    }
    receipts = dict(cache.receipts(root))
    found = []
    for path in sorted({*receipts, *filter(os.path.isfile, of_records)}):  # also where nothing may be read
        receipt = receipts.get(path)
        key, of_record = of_records.get(path, (receipt.source if receipt else "", Expected()))
        found.append(Cached(path=path, source=key, receipt=receipt, expected=_expected(of_record, receipt)))
    return found


def stated(source: Remote, filename: str) -> Expected:
    """What a source's record says about a file: its hash (of the first of its files), the first digits, nothing."""
    if source.sha256 and filename == filenames_of(source)[0]:
        return Expected(num_bytes=source.num_bytes, sha256=source.sha256, stated_by="our lock file")
    prefix = source.sha256_prefix if isinstance(source, URLSource) else None
    return Expected(sha256_prefix=prefix, stated_by="the file's name" if prefix else None)


def _expected(of_record: Expected, receipt: cache.Receipt | None) -> Expected:
    """What a file in the cache is compared with, by what its record and its receipt say."""
    if receipt is None or of_record.sha256:
        return of_record
    return Expected(sha256=receipt.sha256, stated_by=receipt.checked_against)


@cache.readable()
def find_file(source: Remote, filename: str, root: Path, damages: list[Damage]) -> Fetched | None:
    """Find a local file that has the right hash; local files that do not are reported in ``damages``."""
    for path, expected in _candidates(source, filename, root):
        compared = _compare(path, expected)
        if isinstance(compared, Fetched):
            return compared
        damages.append(compared)
        _LOG.warning("%s; it is not used.", compared)
    return None


def _candidates(source: Remote, filename: str, root: Path) -> Iterator[tuple[Path, Expected]]:
    """Yield where a file is on this machine and what to compare it with, if anything states its hash."""
    place, of_record = root / cache.relative_path(source, filename), stated(source, filename)
    expected = _expected(of_record, cache.read_receipt(place))
    if expected.hash and place.is_file():
        yield place, expected
    if isinstance(source, HubSource) and (path := hub.find_in_cache(source, filename)):
        # The Hub's cache names a file by its ETag; without links it does not show that.
        expected = of_record if of_record.hash else hub.expected_of_etag(path.resolve().name)
        if expected.hash:
            yield path, expected


def _compare(path: Path, expected: Expected) -> Fetched | Damage:
    try:
        sha256 = sha256_of(path)
        wrong = difference(path, sha256, expected)
        if wrong is not None:
            return Damage(path, f"is damaged: {wrong}")
        return Fetched(
            path=path,
            sha256=sha256,
            num_bytes=path.stat().st_size,
            checked_against=expected.stated_by,
            downloaded=False,
        )
    except OSError as error:
        return Damage(path, f"cannot be read ({error.strerror})", "unreadable")


def _from_package(source: PackageSource) -> Fetched:
    path = in_package(source.package, source.path)
    if path is None:
        raise MissingExtraError(f"The file {Path(source.path).name}", source.extra)
    compared = _compare(path, Expected(sha256=source.sha256, stated_by="the record"))
    if isinstance(compared, Damage):
        raise ChecksumError(f"{compared}; it was not loaded. Install {source.package} again.")
    return compared


def filenames_of(source: Remote) -> tuple[str, ...]:
    """The files that may hold a source's weights, in order of preference."""
    return source.filenames if isinstance(source, HubSource) else (source.filename,)
