"""Find weights on this machine, or fetch and verify them from whichever of a checkpoint's sources has them.

For a file on the Hub, huggingface_hub supplies address, commit, size, hash and token; the bytes of every source come
through :mod:`wn21k_zoo.transfer`. A file in the Hub's own cache that has the right hash is used in place. A file that
is found is verified every time, without writing anything.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from wn21k_zoo import cache, hub
from wn21k_zoo.cache import Receipt
from wn21k_zoo.checkpoints import Checkpoint, HubSource, PackageSource, URLSource
from wn21k_zoo.errors import (
    AccessDeniedError,
    AuthenticationError,
    CacheError,
    ChecksumError,
    DownloadError,
    InvalidArgumentError,
    OfflineError,
    RemoteNotFoundError,
    WeightsNotFoundError,
)
from wn21k_zoo.exclusive import exclusive
from wn21k_zoo.files import make_folder
from wn21k_zoo.messages import bar_column, bars, on_terminal, say
from wn21k_zoo.on_disk import Damage, Fetched, Remote, filenames_of, find_file, find_verified, stated
from wn21k_zoo.transfer import Expected, Patience, RefusedError, difference, head, number_of_bytes, read_text, transfer

__all__ = ["UnverifiedWeightsWarning", "fetch", "fetch_file", "fetch_source", "is_reachable"]

PROBE_SECONDS = 0.5
FIRST_DOWNLOAD = "the first download"
_logger = logging.getLogger(__name__)


class UnverifiedWeightsWarning(UserWarning):
    """The publisher of a file states no hash, so there was nothing to compare the first download with."""


def fetch(checkpoint: Checkpoint, *, cache_dir: str | os.PathLike[str] | None = None) -> Fetched:
    """Return the verified weight file of a checkpoint, from this machine or else the first source that has it.

    Args:
        checkpoint: A record.
        cache_dir: Cache folder; by default ``WN21K_CACHE`` or the user's cache folder.

    Raises:
        ChecksumError: The bytes are not the published ones, even after a second download; none of them were kept.
        OfflineError: It is not on this machine, and the network is switched off.
        DownloadError: No source provides it; the message is about the first.
        CacheError: The cache cannot be read or written, or its disk has too little space.
        MissingExtraError: It is in an extra that is not installed.
    """
    found, damages = find_verified(checkpoint, cache_dir)
    if found is not None:
        return found
    root = cache.cache_dir(cache_dir)
    remote = [source for source in checkpoint.sources if not isinstance(source, PackageSource)]
    if not remote:
        raise WeightsNotFoundError(f"{checkpoint.name} has no known source.")
    if hub.is_offline():
        # One that can be put there by hand, as its hash is stated.
        first = next((source for source in remote if stated(source, filenames_of(source)[0]).hash), remote[0])
        raise _offline(first, filenames_of(first)[0], root, f"wn21k download {checkpoint.name}", damages)
    errors: list[DownloadError] = []
    patience = Patience()
    for source in remote:
        for filename in filenames_of(source):
            try:
                return _fetch_one(source, filename, root, patience, checkpoint.name, mirror=_mirror())
            except RemoteNotFoundError as error:
                errors.append(error)
            except DownloadError as error:
                errors.append(error)
                break
    others = ", ".join(str(source) for source in remote[1:])
    raise type(errors[0])(f"{checkpoint.name}: {errors[0]}" + (f" (Also tried: {others}.)" if others else ""))


def fetch_source(source: URLSource, *, cache_dir: str | os.PathLike[str]) -> Fetched:
    """Fetch a file from one plain server and nowhere else: no mirror is asked.

    Raises:
        ChecksumError, DownloadError, CacheError: As :func:`fetch`.
    """
    root = cache.cache_dir(cache_dir)
    return _fetch_one(source, source.filename, root, Patience(), source.filename, mirror=None)


def fetch_file(
    source: HubSource, filenames: Sequence[str], *, cache_dir: str | os.PathLike[str] | None = None
) -> Fetched:
    """Fetch the first of several files that a Hub repository has; a newer version there replaces the cached one.

    Raises:
        RemoteNotFoundError: It has none of them.
        OfflineError, ChecksumError, DownloadError, CacheError: As :func:`fetch`.
    """
    root = cache.cache_dir(cache_dir)
    missing: list[RemoteNotFoundError] = []
    damages: list[Damage] = []
    patience = Patience()
    name = f"hf-hub:{source.repo_id}" + (f"@{source.revision}" if source.revision else "")
    for filename in filenames:
        found = find_file(source, filename, root, damages)
        if hub.is_offline():
            if found is not None:
                return found
            continue
        try:
            return _fetch_one(source, filename, root, patience, name, found, mirror=_mirror())
        except RemoteNotFoundError as error:
            missing.append(error)
        except DownloadError:
            if found is not None:  # the Hub cannot be asked whether there is a newer one
                return found
            raise
    if missing:
        raise missing[0]
    raise _offline(source, filenames[0], root, f"wn21k download {name}", damages)


def is_reachable(checkpoint: Checkpoint) -> bool:
    """Whether the first source on the Hub answers one request quickly, including the name look-up."""
    source = next((source for source in checkpoint.sources if isinstance(source, HubSource)), None)
    return source is not None and not hub.is_offline() and hub.answers(source, PROBE_SECONDS)


def _fetch_one(
    source: Remote,
    filename: str,
    root: Path,
    patience: Patience,
    name: str,
    current: Fetched | None = None,
    *,
    mirror: str | None,
) -> Fetched:
    relative = cache.relative_path(source, filename)
    place = root / relative
    copy = None if mirror is None else f"{mirror.rstrip('/')}/{quote(relative.as_posix())}"
    url, expected, revision, headers = _resolve(source, filename, place, copy, patience)
    if current is not None and difference(current.path, current.sha256, expected) is None:
        return current
    for leftover in cache.leftovers(root):
        if leftover.parent == place.parent and leftover.name.startswith(f"{place.name}."):
            continue  # it may be resumed now
        with contextlib.suppress(CacheError):  # another user's, in a shared cache
            cache.remove(leftover, leftover.parent)  # keeps the folder: another process may be about to write there
    make_folder(place.parent, CacheError, "set WN21K_CACHE to another one.")
    if not os.access(place.parent, os.W_OK):
        raise CacheError(f"The cache folder {place.parent} cannot be written; set WN21K_CACHE to another one.")
    with _lock(place, name):
        # Another process may have fetched it meanwhile.
        found = find_file(source, filename, root, [])
        if found is not None and difference(found.path, found.sha256, expected) is None:
            return found
        sha256 = _transfer_from_any(url, place, copy, expected, headers, patience, name)
        receipt = Receipt(
            source=source.key,
            filename=filename,
            revision=revision,
            num_bytes=place.stat().st_size,
            sha256=sha256,
            checked_against=expected.stated_by,
        )
        cache.write_receipt(place, receipt)
    if expected.stated_by is None:
        warnings.warn(
            f"Nobody states a hash of {url}, so it could not be checked; from now on its sha256 must be {sha256}.",
            UnverifiedWeightsWarning,
            stacklevel=4,
        )
    return Fetched(
        path=place, sha256=sha256, num_bytes=receipt.num_bytes, checked_against=expected.stated_by, downloaded=True
    )


def _transfer_from_any(
    url: str,
    place: Path,
    copy: str | None,
    expected: Expected,
    headers: Mapping[str, str],
    patience: Patience,
    name: str,
) -> str:
    """Download from the mirror if one is set and can be checked, else the origin; retry once after a wrong body."""
    candidates: list[tuple[str, Mapping[str, str]]] = [(url, headers), (url, headers)]
    if copy is not None and expected.hash:
        candidates = [(copy, {}), (url, headers)]
    for index, (address, sent) in enumerate(candidates):
        is_last = index == len(candidates) - 1
        try:
            with _progress_bar(name) as report:
                return transfer(address, place, expected, headers=sent, patience=patience, report=report)
        except ChecksumError as error:
            if is_last and expected.stated_by == FIRST_DOWNLOAD:
                hint = f"The first download was different; to accept a new version: wn21k cache prune {name}"
                raise ChecksumError(f"{error} {hint}") from error
            if is_last:
                raise
            _logger.warning("%s", error)
        except DownloadError as error:
            if is_last or address == url:
                raise
            _logger.warning("%s", error)
    raise AssertionError


def _resolve(
    source: Remote, filename: str, place: Path, copy: str | None, patience: Patience
) -> tuple[str, Expected, str | None, Mapping[str, str]]:
    """Return the address, what is known about the file, its commit, and headers for its host."""
    expected = _known(source, filename, place)
    if expected is None:
        try:
            return _asked(source, filename, place, patience)
        except (AuthenticationError, AccessDeniedError, RemoteNotFoundError, RefusedError):
            raise  # the origin gave a definite answer
        except DownloadError:
            expected = _stated_by_mirror(copy, patience)
            if expected is None:
                raise
    if isinstance(source, URLSource):
        return source.url, expected, None, {}
    url, headers = hub.address(source, filename, source.revision)
    return url, expected, source.revision, headers


def _known(source: Remote, filename: str, place: Path) -> Expected | None:
    """What is known about a file without asking a server."""
    expected = stated(source, filename)
    if expected.hash:
        return expected
    return None if isinstance(source, HubSource) else _first_download(place)


def _asked(
    source: Remote, filename: str, place: Path, patience: Patience
) -> tuple[str, Expected, str | None, Mapping[str, str]]:
    if isinstance(source, URLSource):
        answer = head(source.url, patience)
        size = number_of_bytes(answer.get("Content-Length"))
        return source.url, Expected(num_bytes=size, etag=answer.get("ETag")), None, {}
    url, expected, commit, headers = hub.resolve(source, filename, patience)
    return url, expected if expected.hash else _first_download(place) or expected, commit, headers


def _first_download(place: Path) -> Expected | None:
    """What a file without a stated hash must match, once it has been downloaded."""
    receipt = cache.read_receipt(place)
    if receipt is None:
        return None
    return Expected(num_bytes=receipt.num_bytes, sha256=receipt.sha256, stated_by=FIRST_DOWNLOAD)


def _stated_by_mirror(copy: str | None, patience: Patience) -> Expected | None:
    """What a mirror's receipt says, for when the origin itself cannot be reached."""
    if copy is None:
        return None
    try:
        receipt = cache.receipt_from_json(read_text(copy + cache.RECEIPT_SUFFIX, patience))
    except (DownloadError, ValueError) as error:
        _logger.info("%s: %s", copy, error)
        return None
    return Expected(num_bytes=receipt.num_bytes, sha256=receipt.sha256, stated_by="the mirror")


def _mirror() -> str | None:
    mirror = os.environ.get("WN21K_MIRROR") or None
    if mirror is not None and "?" in mirror:  # paths are appended to it
        raise InvalidArgumentError("WN21K_MIRROR has a query (?...); give only the URL of the mirror's folder.")
    return mirror


@cache.readable()
def _offline(source: Remote, filename: str, root: Path, command: str, damages: Sequence[Damage]) -> OfflineError:
    place = root / cache.relative_path(source, filename)
    damaged = f" ({'; '.join(map(str, damages))})" if damages else ""
    if place.is_file() and not damages:
        return OfflineError(
            f"{place} is not used, as nothing states its hash: its receipt is missing. Copy the whole cache folder, or "
            f"download it again once there is a network: {command}"
        )
    return OfflineError(
        f"{filename} of {source} is not at {place}{damaged}, and the network is switched off (HF_HUB_OFFLINE or "
        f"--offline). On a machine with a network run: {command} --cache-dir DIR, then copy DIR to {root}"
    )


def _lock(place: Path, name: str) -> contextlib.AbstractContextManager[None]:
    """Hold the lock under which only this process fetches a file."""

    def waiting() -> None:
        if _may_speak():
            say(f"waiting for another process that is fetching {name}")

    return exclusive(cache.lock_path(place), CacheError, "set WN21K_CACHE to another disk.", seconds=1, waiting=waiting)


def _may_speak() -> bool:
    from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]

    return not are_progress_bars_disabled()


@contextlib.contextmanager
def _progress_bar(name: str) -> Iterator[Any]:
    if not _may_speak():
        yield None
        return
    if not on_terminal():  # e.g. in a notebook
        yield _OneLine(name)
        return
    from rich.progress import DownloadColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import TransferSpeedColumn as Speed

    columns = (TextColumn("{task.description}"), bar_column(), TaskProgressColumn(), DownloadColumn(), Speed())
    with bars(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _OneLine:
    """Says that a file is being fetched, once its first bytes are there."""

    def __init__(self, name: str) -> None:
        self._name, self._said = name, False

    def __call__(self, done: int, total: int | None) -> None:
        if not self._said:
            say(f"fetching {self._name}" + (f", {total / 1e6:,.1f} MB" if total else ""))
        self._said = True
