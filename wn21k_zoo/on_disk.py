"""Find and verify weights that are already on this machine; opens no connection and writes nothing."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from wn21k_zoo import cache, hub
from wn21k_zoo.checkpoints import Checkpoint, HubSource, PackageSource, Source, URLSource
from wn21k_zoo.errors import ChecksumError, MissingExtraError
from wn21k_zoo.files import in_package, sha256_of
from wn21k_zoo.transfer import Expected, difference

__all__ = [
    "Fetched",
    "Remote",
    "cached_files",
    "filenames_of",
    "find_file",
    "find_local",
    "find_verified",
    "stated",
]

Remote = HubSource | URLSource
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


def find_verified(
    checkpoint: Checkpoint, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[Fetched | None, list[str]]:
    """Find the weight file of a checkpoint on this machine if it has the right hash; opens no connection.

    Returns:
        The file or None, and what is wrong with local files that do not have the right hash.

    Raises:
        ChecksumError: A file in a Python package is not the published one.
        MissingExtraError: That package is not installed.
    """
    damages: list[str] = []
    for source in checkpoint.sources:
        if isinstance(source, PackageSource):
            return _from_package(source), damages
        root = cache.cache_dir(cache_dir)
        for filename in filenames_of(source):
            if (found := find_file(source, filename, root, damages)) is not None:
                return found, damages
    return None, damages


def find_local(checkpoint: Checkpoint, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Find the weights of a checkpoint on this machine, without verifying them; opens no connection."""
    for source in checkpoint.sources:
        if isinstance(source, PackageSource):
            return _package_path(source)
        root = cache.cache_dir(cache_dir)
        for filename in filenames_of(source):
            place = root / cache.relative_path(source, filename)
            if place.is_file() and (stated(source, filename).hash or cache.read_receipt(place)):
                return place  # else it cannot be verified
            if not isinstance(source, HubSource) or (path := hub.find_in_cache(source, filename)) is None:
                continue
            if source.sha256 or hub.expected_of_etag(path.resolve().name).stated_by:
                return path
    return None


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


def stated(source: Remote, filename: str) -> Expected:
    """What a source's record says about a file: its hash (of the first of its files), the first digits, nothing."""
    if source.sha256 and filename == filenames_of(source)[0]:
        return Expected(num_bytes=source.num_bytes, sha256=source.sha256, stated_by="our lock file")
    prefix = source.sha256_prefix if isinstance(source, URLSource) else None
    return Expected(sha256_prefix=prefix, stated_by="the file's name" if prefix else None)


def find_file(source: Remote, filename: str, root: Path, damages: list[str]) -> Fetched | None:
    """Find a local file that has the right hash; local files that do not are reported in ``damages``."""
    place = root / cache.relative_path(source, filename)
    of_record, receipt = stated(source, filename), cache.read_receipt(place)
    in_cache = of_record
    if receipt is not None and not of_record.sha256:
        in_cache = Expected(sha256=receipt.sha256, stated_by=receipt.checked_against)
    candidates = [(place, in_cache)]
    if isinstance(source, HubSource) and (path := hub.find_in_cache(source, filename)):
        blob = path.resolve().name  # the Hub's cache names a file by its ETag
        candidates.append((path, of_record if of_record.hash else hub.expected_of_etag(blob)))
    for path, expected in candidates:
        if not expected.hash or not path.is_file():
            continue  # nothing to compare it with: a cache without links does not show the ETag
        try:
            sha256 = sha256_of(path)
            wrong = difference(path, sha256, expected)
        except OSError as error:
            damages.append(f"{path} cannot be read ({error.strerror})")
            continue
        if wrong is not None:
            damages.append(f"{path} is damaged: {wrong}")
            _LOG.warning("%s; it is not used.", damages[-1])
            continue
        return Fetched(
            path=path,
            sha256=sha256,
            num_bytes=path.stat().st_size,
            checked_against=expected.stated_by,
            downloaded=False,
        )
    return None


def _from_package(source: PackageSource) -> Fetched:
    path = _package_path(source)
    if path is None:
        raise MissingExtraError(f"The file {Path(source.path).name}", source.extra)
    sha256 = sha256_of(path)
    if sha256 != source.sha256:
        raise ChecksumError(
            f"{path} is not the published file, so it was not loaded: sha256 expected {source.sha256}, got {sha256}. "
            f"Install {source.package} again."
        )
    return Fetched(
        path=path, sha256=sha256, num_bytes=path.stat().st_size, checked_against="the record", downloaded=False
    )


def _package_path(source: PackageSource) -> Path | None:
    path = in_package(source.package, source.path)
    return path if path is not None and path.is_file() else None


def filenames_of(source: Remote) -> tuple[str, ...]:
    """The files that may hold a source's weights, in order of preference."""
    return source.filenames if isinstance(source, HubSource) else (source.filename,)
