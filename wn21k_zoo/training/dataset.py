"""A split of a data set as shards on this machine, whoever prepared it and wherever it is stored."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.errors import DataError, Wn21kError, did_you_mean, first_line
from wn21k_zoo.exclusive import exclusive
from wn21k_zoo.files import make_folder
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.synsets import WNID_PATTERN
from wn21k_zoo.training.foreign import convert_parquet, index_parquet, index_tar, split_of
from wn21k_zoo.training.shards import (
    INDEX_DTYPE,
    INFO_FILE,
    OPTIONS_FILE,
    WORK_FOLDER,
    DatasetInfo,
    Shard,
    count_targets,
    index_path,
    is_of_others,
    read_fully,
    read_index,
    write_index,
)
from wn21k_zoo.training.storage import ELSEWHERE, Stage, Storage, data_cache_dir, default_stage, open_storage

__all__ = ["ImageDataset", "Images", "ShardedDataset", "images_per_class", "open_dataset"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _ShardRef:
    """A shard: its file in the storage, its length, and its index unless that lies beside it.

    ``signature`` tells it from an earlier file of that name, if its sha256 is not known.
    """

    name: str
    num_samples: int = 0
    num_bytes: int | None = None
    sha256: str | None = None
    signature: str = ""
    index: Path | None = None

    @property
    def is_parquet(self) -> bool:
        return self.name.endswith(".parquet")


class ImageDataset(Protocol):
    """A split of images with their classes, in shards: what a loader reads."""

    def __len__(self) -> int:
        """Number of images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """The wnid, or custom name, of each class."""

    @property
    def label_space(self) -> LabelSpace | None:
        """The label space, if the classes are synsets."""

    @property
    def left_out(self) -> int:
        """Number of images of other classes, 0 if unknown."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of images in each shard."""

    @property
    def digest(self) -> str:
        """Digest of which images there are, not of where they are stored."""

    @property
    def is_here(self) -> bool:
        """Whether shards are read in place, without copying them to this machine first."""

    def open(self, number: int) -> tuple[Images, NDArray[np.void]]:
        """Return a reader of a shard's images, and its index."""

    def index(self, number: int) -> NDArray[np.void]:
        """Return offset, size and target of each image of a shard, which need not be on this machine."""

    def shard_name(self, number: int) -> str:
        """Name of a shard in messages."""

    def place(self, shard: int, key: str) -> str:
        """Return what identifies an image among all others, given its key in the shard."""


def images_per_class(dataset: ImageDataset) -> NDArray[np.int64]:
    """Count the images of each class, shape [number of classes].

    Raises:
        DataError: An index is damaged.
    """
    numbers = range(len(dataset.lengths))
    targets = ((dataset.shard_name(number), dataset.index(number)["target"]) for number in numbers)
    return count_targets(targets, len(dataset.class_names))


@dataclass(frozen=True, kw_only=True, repr=False)
class ShardedDataset:
    """A split of a data set; can be pickled. Created by :func:`open_dataset`.

    ``left_out``: number of samples whose classes the label space lacks, 0 if unknown (third-party data sets).
    """

    storage: Storage
    split: str
    label_space: LabelSpace
    stage: Stage
    shards: tuple[_ShardRef, ...]
    left_out: int = 0

    def __len__(self) -> int:
        return sum(self.lengths)

    def __repr__(self) -> str:
        return (
            f"ShardedDataset({self.storage.url!r}, {self.split!r}, {len(self):,} samples in {len(self.shards):,} "
            f"shards, {self.label_space!r})"
        )

    @property
    def lengths(self) -> tuple[int, ...]:
        """Number of samples in each shard."""
        return tuple(shard.num_samples for shard in self.shards)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The wnid of each class."""
        return self.label_space.wnids

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the shards' names, lengths and, if they are ours, contents; not of where they are stored."""
        lines = [f"{shard.name} {shard.num_samples} {shard.sha256}" for shard in self.shards]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    @property
    def is_here(self) -> bool:
        """Whether the shards are read in place, without a stage."""
        return self.storage.local is not None and not self.shards[0].is_parquet

    def open(self, number: int) -> tuple[Images, NDArray[np.void]]:
        """Return a reader of a shard's images, and its index.

        Raises:
            DataError: The shard is missing or damaged.
            FileNotFoundError: The shard has been removed since.
        """
        path, index = self.local(number)
        return _TarImages(path), index

    def shard_name(self, number: int) -> str:
        """The name of the shard's file."""
        return self.shards[number].name

    def place(self, shard: int, key: str) -> str:
        """Return what identifies an image among all others: the key if we assigned it, else shard and key."""
        return key if self.shards[shard].sha256 else f"{self.shards[shard].name}/{key}"

    def index(self, number: int) -> NDArray[np.void]:
        """Return offset, size and target of each sample of a shard, without fetching the shard itself.

        Raises:
            DataError: The index is missing or damaged.
        """
        shard = self.shards[number]
        index = shard.index
        if index is None:
            beside = index_path(Path(shard.name)).as_posix()
            if self.storage.local is not None:
                index = self.storage.local / beside
            else:
                index = self.stage.get(str(index_path(self._staged(shard))), lambda to: self.storage.fetch(beside, to))
        return read_index(index, shard.num_samples)

    def _staged(self, shard: _ShardRef) -> Path:
        return Path(_short(self.storage.url)[:16]) / _short(shard.sha256 or shard.signature)[:8] / shard.name

    def local(self, number: int) -> tuple[Path, NDArray[np.void]]:
        """Return the tar file of a shard on this machine, staged if need be, and its index.

        Raises:
            DataError: The shard is missing or damaged.
        """
        shard = self.shards[number]
        staged = self._staged(shard)
        if shard.is_parquet:
            return self._converted(shard, staged)
        if self.storage.local is not None:
            return self.storage.local / shard.name, self.index(number)
        path = self.stage.get(str(staged), lambda to: self.storage.fetch(shard.name, to), shard.sha256, shard.num_bytes)
        return path, self.index(number)

    def _converted(self, shard: _ShardRef, staged: Path) -> tuple[Path, NDArray[np.void]]:
        assert shard.index is not None  # noqa: S101
        rows = read_index(shard.index)
        # A different label space keeps different rows: the name says which.
        path = staged.with_name(f"{staged.stem}.{shard.index.stem[:16]}.tar")

        def make(target: Path) -> None:
            with self.storage.open(shard.name) as file:
                write_index(index_path(self.stage.folder / path), convert_parquet(file, rows, target))

        tar = self.stage.get(str(path), make)
        return tar, read_index(index_path(tar), shard.num_samples)


class Images(Protocol):
    """Reads the images of a shard by their entries in its index."""

    def read(self, offset: int, size: int) -> bytes:
        """Return the file's bytes."""

    def key(self, offset: int) -> str:
        """Return the file's name, for messages."""

    def close(self) -> None:
        """Close what is open."""


class _TarImages:
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def read(self, offset: int, size: int) -> bytes:
        try:
            self._file.seek(offset)
        except (ValueError, OverflowError):  # larger than any file
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL)) from None
        return read_fully(self._file, size)

    def key(self, offset: int) -> str:
        """Return the name in the tar header before an image."""
        with contextlib.suppress(OSError, tarfile.TarError):
            return tarfile.TarInfo.frombuf(
                self.read(offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE), "utf-8", "replace"
            ).name
        return f"at byte {offset}"

    def close(self) -> None:
        self._file.close()


def open_dataset(
    place: str | os.PathLike[str],
    split: str = "train",
    *,
    label_space: str | os.PathLike[str] | LabelSpace | Sequence[str] | None = None,
    stage: Stage | None = None,
) -> ShardedDataset:
    """Open a split of a prepared data set, ours or a third-party one.

    Args:
        place: An output folder of ``wn21k data prepare``; a folder of third-party WebDataset tars or Parquet files,
            such as a download of ``timm/imagenet-22k-wds`` or ``timm/imagenet-w21-p``; or a URL of such a folder that
            fsspec understands (``s3://bucket/folder``, ``hf://datasets/timm/imagenet-w21-p``).
        split: ``train``, ``validation`` or another existing split.
        label_space: A name, a text file of wnids, a label space or a list of wnids. Classes are mapped to it by synset,
            and samples of other classes are left out. Default: that of the data set if it is one of ours, else
            ``fall11``.
        stage: Where to copy remote shards. Default: :func:`~wn21k_zoo.training.storage.default_stage`.

    Raises:
        DataError: There is no data or no such split, or its classes cannot be determined.
        UnknownLabelSpaceError, LabelSpaceError, UnknownSynsetError: As :meth:`LabelSpace.find`.
    """
    storage = open_storage(place)
    stage = stage or default_stage()
    try:
        info = _ours(storage.read_text(INFO_FILE), storage.url)
        names = storage.names() if info is None else []
    except DataError:
        raise
    except Exception as error:  # each storage raises its own
        raise DataError(f"{storage.url} cannot be read: {first_line(error)}") from error
    if info is not None:
        return _open_ours(storage, info, split, None if label_space is None else LabelSpace.find(label_space), stage)
    if f"{WORK_FOLDER}/{OPTIONS_FILE}" in names:
        raise DataError(
            f"{storage.url} is an unfinished output of `wn21k data prepare`; run that command again to finish it."
        )
    names = [name for name in names if name.endswith((".tar", ".parquet"))]
    names = [name for name in names if not PurePosixPath(name).name.startswith(".")]  # ._NAME of macOS
    mine = [name for name in names if split_of(name) == split]
    if not mine:
        there = sorted({found for name in names if (found := split_of(name))})
        other = ", or is not reachable"
        if storage.local is not None:
            folders = any(entry.is_dir() for entry in storage.local.iterdir())
            other = "; use open_folder for class folders" if folders else ", nor class folders (CLASS/photo.jpg)"
        what = (
            f"its splits are {', '.join(there)}" if there else f"it holds no shards (SPLIT-*.tar or *.parquet){other}"
        )
        if any(WNID_PATTERN.fullmatch(PurePosixPath(name).stem) for name in names):
            what += "; `wn21k data prepare` makes shards from class archives"
        raise DataError(f"{storage.url} has no split {split!r}: {what}.{did_you_mean(split, there)}")
    space = LabelSpace.find(label_space or "fall11")
    classes = space.index

    def build(name: str) -> NDArray[np.void]:
        with storage.open(name) as file:
            return index_parquet(file, name, classes) if name.endswith(".parquet") else index_tar(file, name, classes)

    signatures = _signatures(storage, mine)
    indexes = _indexes(storage, signatures, space.digest, build)
    refs = [_ShardRef(name=name, signature=signature) for name, signature in signatures.items()]
    return _dataset(storage, split, space, stage, refs, indexes)


def _ours(text: str | None, url: str) -> DatasetInfo | None:
    if text is None or is_of_others(text):
        return None
    try:
        return DatasetInfo.from_json(text)
    except ValueError as error:  # without it the classes would be different ones
        raise DataError(
            f"{INFO_FILE} of {url} is damaged ({error}); fetch it again, or prepare into a new folder."
        ) from None


def _open_ours(
    storage: Storage, info: DatasetInfo, split: str, wanted: LabelSpace | None, stage: Stage
) -> ShardedDataset:
    if split not in info.splits:
        raise DataError(
            f"{storage.url} has no split {split!r}; its splits are {', '.join(info.splits)}."
            f"{did_you_mean(split, info.splits)}"
        )
    shards = info.splits[split]
    if storage.local is not None:
        _check_sizes(storage.local, shards)
    elif (size := sum(shard.num_bytes for shard in shards)) > stage.limit:
        _LOG.warning(
            "%s has %.0f GB of shards, but only %.0f GB are kept on this machine: many will be fetched again in each "
            "epoch; raise WN21K_DATA_CACHE_GB.",
            storage.url, size / 1e9, stage.limit / 1e9,
        )  # fmt: skip
    try:
        own = info.space
    except DataError as error:
        raise DataError(f"{storage.url}: {error}") from None
    if own.digest != info.label_digest:
        raise DataError(f"{storage.url} was prepared with other classes named {info.label_space}; prepare it again.")
    space = wanted or own
    refs = tuple(
        _ShardRef(name=each.name, num_samples=each.num_samples, num_bytes=each.num_bytes, sha256=each.sha256)
        for each in shards
    )
    if space.digest == own.digest:
        return ShardedDataset(storage=storage, split=split, label_space=space, stage=stage, shards=refs)
    mapped = np.array([space.index.get(wnid, -1) for wnid in own.wnids], np.int32)
    samples = {ref.name: ref.num_samples for ref in refs}

    def build(name: str) -> NDArray[np.void]:
        with storage.open(index_path(Path(name)).as_posix()) as file:
            index: NDArray[np.void] = np.load(io.BytesIO(file.read()), allow_pickle=False)
        if index.dtype != INDEX_DTYPE or index.shape != (samples[name],):
            raise DataError(f"The index of {name} of {storage.url} does not fit its shard; fetch it again.")
        count_targets([(name, index["target"])], len(own))
        index["target"] = mapped[index["target"]]
        return index[index["target"] >= 0]

    indexes = _indexes(storage, _signatures(storage, [ref.name for ref in refs]), space.digest, build)
    dataset = _dataset(storage, split, space, stage, refs, indexes)
    return replace(dataset, left_out=sum(ref.num_samples for ref in refs) - len(dataset))


def _check_sizes(folder: Path, shards: Sequence[Shard]) -> None:
    """Check that the shards of a folder exist and are complete, as far as their sizes tell.

    Raises:
        DataError: A shard is not.
    """
    for shard in shards:
        try:
            size = (folder / shard.name).stat().st_size
        except OSError:
            raise DataError(f"{folder / shard.name} is missing; copy it again, or prepare the data again.") from None
        if size != shard.num_bytes:
            raise DataError(
                f"{folder / shard.name} has {size:,} bytes, but had {shard.num_bytes:,} when it was written; copy it "
                "again, or prepare the data again."
            )


def _dataset(
    storage: Storage, split: str, space: LabelSpace, stage: Stage, refs: Sequence[_ShardRef], indexes: list[Path]
) -> ShardedDataset:
    indexed = (
        replace(ref, index=index, num_samples=len(read_index(index))) for ref, index in zip(refs, indexes, strict=True)
    )
    shards = tuple(ref for ref in indexed if ref.num_samples)
    if not shards:
        raise DataError(f"{storage.url}, split {split!r}: no sample has a class of {space.name}.")
    return ShardedDataset(storage=storage, split=split, label_space=space, stage=stage, shards=shards)


def _signatures(storage: Storage, names: list[str]) -> dict[str, str]:
    """Return each file's signature, by its name."""

    def signature(name: str) -> str:
        with _errors_of(storage, name):
            return storage.signature(name)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:  # waiting for the storage, not computing
        return dict(zip(names, pool.map(signature, names), strict=True))  # an error cancels what has not started


def _indexes(
    storage: Storage, signatures: Mapping[str, str], digest: str, build: Callable[[str], NDArray[np.void]]
) -> list[Path]:
    """Return each file's index in the cache, built by one process if it is missing or the file has changed."""
    folder = data_cache_dir() / "index"
    make_folder(folder, DataError, ELSEWHERE)
    names = list(signatures)
    paths = [folder / f"{_short(chr(10).join((storage.url, *each, digest)))}.npy" for each in signatures.items()]

    def make(name: str, path: Path) -> None:
        with _errors_of(storage, name):
            index = build(name)
        try:
            write_index(path, index)
        except OSError as error:
            raise DataError(
                f"{path} cannot be written: {first_line(error)}; make room, or set WN21K_DATA_CACHE."
            ) from None

    if all(map(_is_index, paths)):
        return paths
    lock = folder / f"{_short(storage.url)}.lock"

    def waiting() -> None:
        _LOG.warning("waiting for the process that is indexing %s", storage.url)

    with (
        exclusive(lock, DataError, ELSEWHERE, seconds=5, waiting=waiting),
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        missing = [(name, path) for name, path in zip(names, paths, strict=True) if not _is_index(path)]
        if missing:  # else another process has made them meanwhile
            _LOG.warning("indexing %d files of %s, once", len(missing), storage.url)
            for done, _ in enumerate(pool.map(make, *zip(*missing, strict=True)), start=1):
                if done % max(100, len(missing) // 10) == 0:
                    _LOG.warning("%d of %d files are done", done, len(missing))
    return paths


def _is_index(path: Path) -> bool:
    """Whether an index exists and is not damaged."""
    try:
        read_index(path)
    except DataError:
        return False
    return True


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@contextlib.contextmanager
def _errors_of(storage: Storage, name: str) -> Iterator[None]:
    try:
        yield
    except Wn21kError:
        raise
    except Exception as error:  # each storage raises its own
        raise DataError(f"{name} of {storage.url} cannot be read: {first_line(error)}") from error
