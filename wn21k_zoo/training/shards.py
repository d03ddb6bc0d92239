"""The format of a prepared data set: WebDataset tar shards, a sidecar index per shard, and one ``_info.json``.

::

    OUT/_info.json                splits, shards with length, size and sha256, label space, how it was prepared
    OUT/train-00000.tar           per sample KEY.jpg, KEY.cls (class index) and KEY.json (name, synset, size)
    OUT/__index__/train-00000.npy per sample where its image is in the tar, and its class index
    OUT/validation-00000.tar      and so on
    OUT/manifest.parquet          a row for every image of the source
    OUT/classes.csv, SUMMARY.md   the same, for people to read

WebDataset, timm and Hugging Face ``datasets`` read the tar files; ``_info.json`` has the keys that timm's reader
expects (``splits``, ``filenames``, ``shard_lengths``, ``num_samples``).
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.errors import DataError, Wn21kError, first_line
from wn21k_zoo.files import atomic_file, local_path, parse_json
from wn21k_zoo.labels import LabelSpace

__all__ = [
    "BLOCK",
    "END_OF_TAR",
    "INDEX_DTYPE",
    "INDEX_FOLDER",
    "INFO_FILE",
    "MANIFEST_FILE",
    "OPTIONS_FILE",
    "WORK_FOLDER",
    "DatasetInfo",
    "Shard",
    "count_targets",
    "encode_record",
    "index_path",
    "is_of_others",
    "is_prepared",
    "load_index",
    "read_fully",
    "read_index",
    "read_info",
    "sample_hash",
    "shard_name",
    "write_index",
]

INFO_FILE = "_info.json"
MANIFEST_FILE = "manifest.parquet"
WORK_FOLDER = ".work"
OPTIONS_FILE = "options.json"  # in the work folder until the work is done
INDEX_FOLDER = "__index__"  # Hugging Face datasets does not take a folder with such a name for data
BLOCK = tarfile.BLOCKSIZE
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*\.tar")
END_OF_TAR = bytes(2 * BLOCK)
_FORMAT = "wn21k_zoo shards, version 1"

INDEX_DTYPE = np.dtype([("offset", "<u8"), ("size", "<u4"), ("target", "<i4")])
"""One entry per sample: offset of the image's bytes in the tar, their number, and the class index."""


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One tar file of a split."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class DatasetInfo:
    """The content of ``_info.json``.

    ``label_space`` is the name of a label space, ``label_digest`` its digest, and ``wnids`` its classes if it is not
    shipped; class indices are positions in it. ``preparation`` holds the options that the bytes depend on.
    """

    label_space: str
    label_digest: str
    splits: dict[str, tuple[Shard, ...]]
    preparation: dict[str, Any] = field(default_factory=dict)
    wnids: tuple[str, ...] | None = None

    @functools.cached_property
    def space(self) -> LabelSpace:
        """The label space.

        Raises:
            DataError: No shipped label space has this name, or the wnids are not valid.
        """
        try:
            return LabelSpace.load(self.label_space) if self.wnids is None else LabelSpace(self.label_space, self.wnids)
        except Wn21kError as error:
            raise DataError(f"{INFO_FILE} names unknown classes: {error}") from None

    def to_json(self) -> str:
        """The text of ``_info.json``."""
        splits = {
            split: {
                "name": split,
                "num_samples": sum(shard.num_samples for shard in shards),
                "filenames": [shard.name for shard in shards],
                "shard_lengths": [shard.num_samples for shard in shards],
                "num_bytes": [shard.num_bytes for shard in shards],
                "sha256": [shard.sha256 for shard in shards],
            }
            for split, shards in self.splits.items()
        }
        whole = {
            "format": _FORMAT,
            "label_space": self.label_space,
            "label_digest": self.label_digest,
            **({} if self.wnids is None else {"wnids": self.wnids}),
            "splits": splits,
            "preparation": self.preparation,
        }
        return json.dumps(whole, indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> DatasetInfo:
        """Read the text of an ``_info.json`` of ours.

        Raises:
            ValueError: It is not one of ours.
        """
        whole = parse_json(text)
        try:
            if whole["format"] != _FORMAT:
                raise TypeError(f"its format is {whole['format']!r}, not {_FORMAT!r}")
            if not isinstance(whole["label_space"], str) or not isinstance(whole["preparation"], dict):
                raise TypeError("label_space is not a name, or preparation is not an object")
            return DatasetInfo(
                label_space=whole["label_space"],
                label_digest=whole["label_digest"],
                splits={split: _shards_of(split, entry) for split, entry in whole["splits"].items()},
                preparation=whole["preparation"],
                wnids=_wnids_of(whole.get("wnids")),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(first_line(error)) from None


def is_of_others(text: str) -> bool:
    """Whether an ``_info.json`` was written by another program, such as timm; a damaged one may be ours."""
    try:
        whole = parse_json(text)
    except ValueError:
        return False
    return not (isinstance(whole, dict) and str(whole.get("format")).startswith(_FORMAT.partition(",")[0]))


def _wnids_of(entry: Any) -> tuple[str, ...] | None:
    if not (entry is None or (isinstance(entry, list) and all(isinstance(wnid, str) for wnid in entry))):
        raise TypeError("wnids is not a list of strings")
    return None if entry is None else tuple(entry)


def _shards_of(split: str, entry: dict[str, Any]) -> tuple[Shard, ...]:
    if entry["name"] != split:
        raise TypeError(f"its split {split!r} has the name {entry['name']!r}")
    columns = (entry["filenames"], entry["shard_lengths"], entry["num_bytes"], entry["sha256"])
    for kind, column in zip((str, int, int, str), columns, strict=True):
        if not all(isinstance(value, kind) for value in column):
            raise TypeError(f"one of the lists of shards has an entry that is not {kind.__name__}")
    if not all(0 <= number < 2**63 for number in (*columns[1], *columns[2])):
        raise TypeError("one of the lists of shards has a number that is no size or length")
    if entry["num_samples"] != sum(columns[1]):
        raise TypeError(f"num_samples of {split} is {entry['num_samples']!r}, its shards have {sum(columns[1]):,}")
    if strange := next((name for name in columns[0] if not _FILE_NAME.fullmatch(name)), None):
        raise TypeError(f"{strange!r} is not the name of a shard")
    return tuple(
        Shard(name=name, num_samples=length, num_bytes=size, sha256=sha256)
        for name, length, size, sha256 in zip(*columns, strict=True)
    )


def read_info(folder: str | os.PathLike[str]) -> DatasetInfo:
    """Read ``_info.json`` of a prepared folder.

    Raises:
        DataError: There is none, or ``wn21k data prepare`` did not write it.
    """
    folder = local_path(folder, DataError, "only a folder of this machine, or one that is mounted, can be looked at.")
    path = folder / INFO_FILE
    try:
        info = DatasetInfo.from_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "is not a folder" if not folder.is_dir() else f"has no {INFO_FILE}"
        raise DataError(
            f"{folder} {what}; name a finished output folder of `wn21k data prepare` (to finish an unfinished "
            "one, run the same command again)."
        ) from None
    except NotADirectoryError:
        raise DataError(f"{folder} is a file; name an output folder of `wn21k data prepare`.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); ask its owner, or name another folder.") from None
    except ValueError as error:
        raise DataError(
            f"{path} is not as `wn21k data prepare` writes it ({error}); get a new copy, or prepare into a new folder."
        ) from None
    try:
        info.space  # noqa: B018
    except DataError as error:
        raise DataError(f"{folder}: {error}") from None
    return info


def is_prepared(folder: Path) -> bool:
    """Whether a folder is an output of ``wn21k data prepare``, finished or not, whatever else lies in it."""
    # These are false where nothing may be read.
    if os.path.isfile(folder / INFO_FILE):  # noqa: PTH113
        return os.path.isfile(folder / MANIFEST_FILE) or os.path.isdir(folder / INDEX_FOLDER)  # noqa: PTH112, PTH113
    return os.path.isfile(folder / WORK_FOLDER / OPTIONS_FILE)  # noqa: PTH113


def shard_name(split: str, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05d}.tar"


def index_path(shard: Path) -> Path:
    """The sidecar index of a shard."""
    return shard.parent / INDEX_FOLDER / f"{shard.name.removesuffix('.tar')}.npy"


def count_targets(shards: Iterable[tuple[str, NDArray[Any]]], classes: int) -> NDArray[np.int64]:
    """Count the images of each class in shards, given their names and targets; shape [classes].

    Raises:
        DataError: A target is not a class.
    """
    counts = np.zeros(classes, np.int64)
    for name, targets in shards:
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
            raise DataError(f"{name} has class indices outside the label space; run `wn21k data verify`.")
        counts += np.bincount(targets, minlength=classes)
    return counts


def read_fully(file: IO[bytes], size: int) -> bytes:
    """Read from a file, which may return less at a time if it is unbuffered; less than ``size`` only at its end."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def read_index(path: Path, num_samples: int | None = None) -> NDArray[np.void]:
    """A sidecar index, memory-mapped, dtype :data:`INDEX_DTYPE`, shape [samples].

    Raises:
        DataError: It is missing, damaged or has another length.
    """
    try:
        return load_index(path, num_samples)
    except ValueError as error:
        raise DataError(f"{error}; `wn21k data verify` shows what is damaged.") from None


def load_index(path: Path, num_samples: int | None = None) -> NDArray[np.void]:
    """As :func:`read_index`, for what verifies data.

    Raises:
        ValueError: It is missing, damaged or has another length.
    """
    try:
        index: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
        fits = index.dtype == INDEX_DTYPE and index.ndim == 1 and num_samples in (None, len(index))
    except Exception as error:  # NumPy reads the header of a file as Python, which can fail in many ways
        raise ValueError(f"The index {path} cannot be read ({error})") from None
    if not fits:
        raise ValueError(f"The index {path} does not fit its shard")
    return index


def write_index(path: Path, index: NDArray[np.void]) -> None:
    """Write a sidecar index atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.save(file, np.ascontiguousarray(index, dtype=INDEX_DTYPE), allow_pickle=False)


def encode_record(key: str, image: bytes, target: int, details: dict[str, Any]) -> bytes:
    """The tar members of one sample, to be concatenated; the image's bytes are at offset :data:`BLOCK`.

    Times and owners are constants, so the bytes depend on the arguments alone.
    """
    text = json.dumps(details, separators=(",", ":")).encode()
    members = ((f"{key}.jpg", image), (f"{key}.cls", str(target).encode()), (f"{key}.json", text))
    return b"".join(_member(name, data) for name, data in members)


def _member(name: str, data: bytes) -> bytes:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    return b"".join((member.tobuf(tarfile.USTAR_FORMAT), data, bytes(-len(data) % BLOCK)))


def sample_hash(key: str) -> int:
    """The 64-bit number by which a split's samples are sorted: pseudo-random, a function of the key alone."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, person=b"wn21k order").digest(), "big")
