"""A folder of class folders with loose image files: the most common kind of custom data set.

``DIR/train/CLASS/...`` and ``DIR/val/CLASS/...`` (or ``validation``, ``valid``, ``test``), which may lack some of the
classes, and perhaps ``DIR/test/CLASS/...`` beside them; or ``DIR/CLASS/...``, where one image in ten, chosen by a hash
of its name, is for validation. Names are compared in one form of Unicode (NFC): some macOS file systems and archives
use another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.errors import (
    DataError,
    InvalidArgumentError,
    LabelSpaceError,
    MissingExtraError,
    UnknownSynsetError,
    did_you_mean,
)
from wn21k_zoo.files import expanded, is_hidden
from wn21k_zoo.images import IMAGE_SUFFIXES
from wn21k_zoo.labels import ClassNames, LabelSpace
from wn21k_zoo.synsets import WNID_PATTERN
from wn21k_zoo.training.shards import is_prepared
from wn21k_zoo.training.sources import files_below

__all__ = ["FolderDataset", "composed", "is_among", "is_class_folder", "is_divided", "open_folder", "open_folders"]

_VALIDATION = ("validation", "val", "valid", "test")
_SPLITS = ("train", "validation", "test", "all")
_SHARDS = (".tar", ".parquet")
_SKETCH = 64  # images
_LOOK_AT = 2**20  # bytes of each of these
_LOOK = 20  # files looked at in a folder, to tell whether they are shards
_GROUP = 1000  # files that count as one shard
_INDEX = np.dtype([("offset", np.int64), ("size", np.int64), ("target", np.int32)])


@dataclass(frozen=True, eq=False)
class _Names:
    """Many names in two arrays, which forked processes share; of separate objects each would end up with a copy."""

    text: NDArray[np.uint8]
    ends: NDArray[np.int64]

    def __getitem__(self, number: int) -> str:
        return os.fsdecode(self.text[self.ends[number] : self.ends[number + 1]].tobytes())


@dataclass(frozen=True, eq=False)
class _Listing:
    """The images below some folders, class by class."""

    names: _Names
    targets: NDArray[np.int32]
    hashes: NDArray[np.uint64]
    passed_over: Mapping[str, int]


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class FolderDataset:
    """Loose images with their classes, for :class:`wn21k_zoo.training.data.Loader`. Created by :func:`open_folder`.

    Attributes:
        root: The folder.
        split: ``train``, ``validation``, ``test`` or ``all``.
        class_names: Names of the class folders (NFC) in byte order; targets are indices into it.
        targets: Class index of each image, [n] int32.
        left_out: Number of images whose classes a label space lacks.
        passed_over: Number of files that do not have the name of an image, by suffix; in the whole folder if that is
            not divided into splits.
    """

    root: Path
    split: str
    class_names: tuple[str, ...]
    targets: NDArray[np.int32]
    _names: _Names
    _numbers: NDArray[np.int64]
    _hashes: NDArray[np.uint64]
    left_out: int = 0
    passed_over: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.targets)

    def __repr__(self) -> str:
        return (
            f"FolderDataset({str(self.root)!r}, {self.split!r}, {len(self):,} images, {len(self.class_names)} classes)"
        )

    def name(self, sample: int) -> str:
        """Return the path of an image below the root, with slashes."""
        return self._names[self._numbers[sample]]

    def place(self, shard: int, key: str) -> str:
        """Return what identifies an image among all others: its path."""
        del shard
        return key

    @functools.cached_property
    def label_space(self) -> LabelSpace | None:
        """The classes as synsets if all their names are wnids, else None."""
        try:
            return LabelSpace("custom", self.class_names)
        except (LabelSpaceError, UnknownSynsetError):
            return None

    def mapped_to(self, space: LabelSpace) -> FolderDataset:
        """Map the targets to a label space, by the names of the folders; other synsets are left out.

        Raises:
            DataError: A folder's name is not a wnid, or no folder's name is a class of the label space.
        """
        what = f"class of {space.name}; folders must be named by its wnids (`wn21k tree search` finds them)"
        mapped = self.mapped(space.wnids, what, WNID_PATTERN)
        if not len(mapped):
            raise DataError(f"{self.root}, {self.split}: no folder is named after a class of {space.name}.")
        return mapped

    def mapped(self, class_names: tuple[str, ...], what: str, may_lack: re.Pattern[str] | None = None) -> FolderDataset:
        """Map the targets to other classes, by name.

        Raises:
            DataError: A folder's name is neither one of them nor one that may be left out; ``what`` says what it should
                be.
        """
        index = {composed(name): number for number, name in enumerate(class_names)}
        unknown = set(self.class_names) - set(index)
        if wrong := [name for name in unknown if may_lack is None or not may_lack.fullmatch(name)]:
            raise DataError(f"{self.root} has a folder {min(wrong)}, which is not a {what}.")
        targets = np.array([index.get(name, -1) for name in self.class_names], np.int32)[self.targets]
        there = targets >= 0
        return dataclasses.replace(
            self,
            class_names=class_names,
            targets=targets[there],
            _numbers=self._numbers[there],
            _hashes=self._hashes[there],
            left_out=self.left_out + len(there) - int(there.sum()),
        )

    @functools.cached_property
    def digest(self) -> str:
        """Digest of the files' names below the folder, not of their contents or of where the folder is."""
        text, ends = self._names.text, self._names.ends
        if text.max(initial=0) > 127:
            names = [_composed_bytes(text[begin:end].tobytes()) for begin, end in itertools.pairwise(ends.tolist())]
            text = np.frombuffer(b"".join(names), np.uint8)
            ends = np.cumsum([0, *map(len, names)], dtype=np.int64)
        digest = hashlib.sha256()
        for array in (text, ends, self._numbers):  # in place: a copy of millions of names would be large
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    @functools.cached_property
    def sketch(self) -> str:
        """What tells these images from others: those of two sets overlap as much as the sets do (MinHash).

        For each image with one of the smallest hashes of CLASS/NAME that hash, and one of name and content: files are
        often just numbered.
        """
        hashes = self._hashes
        if is_divided(self.root):  # names begin with that of the split
            inner = (os.fsencode(self.name(sample).partition("/")[2]) for sample in range(len(self)))
            hashes = np.frombuffer(b"".join(map(_hash, inner)), ">u8").astype(np.uint64)
        return " ".join(
            f"{hashes[sample]:016x}.{self._content(sample, hashes[sample].tobytes())}"
            for sample in np.argsort(hashes, kind="stable")[:_SKETCH]
        )

    def _content(self, sample: int, begin: bytes) -> str:
        digest = hashlib.blake2b(begin, digest_size=4)
        with contextlib.suppress(OSError), (self.root / self.name(sample)).open("rb") as file:
            digest.update(file.read(_LOOK_AT))
        return digest.hexdigest()

    def share_in(self, sketch: str) -> float:
        """Estimate the share of these images that are among those of another's sketch; 0 if it cannot be told."""
        if not sketch:
            return 0.0
        others = {*sketch.split()}
        last = max(others).partition(".")[0]
        comparable = [each for each in self.sketch.split() if each.partition(".")[0] <= last]
        return sum(each in others for each in comparable) / len(comparable) if comparable else 0.0

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Number of images in each group that is read like a shard."""
        return tuple(min(_GROUP, len(self) - first) for first in range(0, len(self), _GROUP))

    @property
    def is_here(self) -> bool:
        """Always true."""
        return True

    def shard_name(self, number: int) -> str:
        """The name of the whole split, for every group."""
        del number
        return f"{self.root} ({self.split})"

    def open(self, number: int) -> tuple[_LooseFiles, NDArray[np.void]]:
        """Return a reader of a group's images, and its index."""
        first = number * _GROUP
        names = tuple(self.name(sample) for sample in range(first, first + self.lengths[number]))
        return _LooseFiles(self.root, names), self.index(number)

    def index(self, number: int) -> NDArray[np.void]:
        """Return number and target of each image of a group."""
        mine = self.targets[number * _GROUP : (number + 1) * _GROUP]
        index = np.zeros(len(mine), _INDEX)
        index["offset"], index["target"] = np.arange(len(mine)), mine
        return index


class _LooseFiles:
    def __init__(self, root: Path, names: tuple[str, ...]) -> None:
        self._root, self._names = root, names

    def read(self, offset: int, size: int) -> bytes:
        del size
        return (self._root / self._names[offset]).read_bytes()

    def key(self, offset: int) -> str:
        return self._names[offset]

    def close(self) -> None:
        """Do nothing: no file stays open."""


def is_class_folder(place: str | os.PathLike[str]) -> bool:
    """Whether a place is a local folder with subfolders, without shards in it or in these, and not one of ours.

    Ours are those that ``wn21k data prepare`` writes, finished or not.

    Raises:
        DataError: No folder can have this name, or it begins with ~ and an unknown user name.
    """
    folder = expanded(place, DataError)
    if not folder.is_dir() or is_prepared(folder):
        return False
    entries = [entry for entry in folder.iterdir() if not is_hidden(entry.name)]
    below = sorted(entry for entry in entries if entry.is_dir())
    if any(entry.name.endswith(_SHARDS) for entry in entries):
        return False
    for each in below:
        names = _some_of(each)
        if any(map(_is_image, names)):
            return True
        if any(name.endswith(_SHARDS) for name in names) and not is_prepared(each):
            return False
    return bool(below)


def _some_of(folder: Path) -> list[str]:
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # only its owner may read lost+found
        return [entry.name for entry in itertools.islice(entries, _LOOK)]
    return []


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def open_folder(
    place: str | os.PathLike[str],
    split: str = "train",
    *,
    label_space: str | os.PathLike[str] | LabelSpace | ClassNames | Sequence[str] | None = None,
) -> FolderDataset:
    """Open the images of a split.

    Args:
        place: The folder.
        split: ``train``, ``validation``, ``test`` (the folder of that name), or ``all``: training and validation.
        label_space: A name, a text file of wnids, a label space or a list of wnids. Targets are indices into it, by the
            wnids that name the folders; images of other synsets are left out. With :class:`ClassNames` they are indices
            into these. Default: indices into the sorted names of the folders.

    Raises:
        DataError: The folder has no classes or images, no such split, or classes that its training part lacks; with a
            label space also as :meth:`FolderDataset.mapped_to`.
        MissingExtraError: It has HEIF photographs, and the extra ``heif`` is not installed.
        UnknownLabelSpaceError, LabelSpaceError, UnknownSynsetError, InvalidArgumentError: As :meth:`LabelSpace.find`.
    """
    (dataset,) = open_folders(place, (split,))
    if isinstance(label_space, ClassNames):
        if len({*label_space}) < len(label_space):
            raise InvalidArgumentError("label_space has a name twice; targets are found by name, so rename one.")
        return dataset.mapped(tuple(label_space), "class of the given names")
    return dataset if label_space is None else dataset.mapped_to(LabelSpace.find(label_space))


def open_folders(place: str | os.PathLike[str], splits: Sequence[str] = _SPLITS[:2]) -> list[FolderDataset]:
    """Open several splits with one look at the folder; as :func:`open_folder`."""
    root = expanded(place, DataError).absolute()
    for split in splits:
        if split not in _SPLITS:
            near = " Did you mean validation?" if split in _VALIDATION else did_you_mean(str(split), _SPLITS)
            raise DataError(f"{root} has the splits {', '.join(_SPLITS)}, not {split!r}.{near}")
    if not root.is_dir():
        raise DataError(f"{root} {'is a file' if root.exists() else 'does not exist'}; name a folder of class folders.")
    below = _folders(root)
    if "test" in splits and not ("test" in below and _divides(root, below)):
        lacks = "has no folder test beside train" if _divides(root, below) else "has no folders train and test"
        raise DataError(f"{root} {lacks}; name a folder with the class folders to test on.")
    if not _divides(root, below):
        lower = {name.casefold() for name in below}
        if lower & {*_VALIDATION} and lower & {"train", "training"}:
            raise DataError(f"{root} has folders for training and validation; call them train and val, in lower case.")
        classes = _classes(root)
        listing = _listing(root, [[each] for each in classes])
        return [_dataset(root, split, classes, listing, _share(listing, split)) for split in splits]
    validation = next((name for name in _VALIDATION if name in below), None)
    if validation is None and "validation" in splits:
        raise DataError(f"{root} has a folder train, but none for validation: {', '.join(_VALIDATION)}.")
    parts = ["train", *filter(None, [validation])]
    tops = {"train": parts[:1], "validation": parts[1:], "test": ["test"], "all": parts}
    looked_at = [
        top for top in dict.fromkeys([*parts, "test"]) if top == "train" or any(top in tops[split] for split in splits)
    ]
    real = {top: {composed(name): name for name in _classes(root / top, 1 + (top == "train"))} for top in looked_at}
    classes = list(real["train"])
    datasets = []
    for split in splits:
        for top in tops[split]:
            if unknown := real[top].keys() - real["train"].keys():
                raise DataError(f"{root / top} has the class {min(unknown)}, which {root / 'train'} lacks.")
        folders = [[f"{top}/{real[top][each]}" for top in tops[split] if each in real[top]] for each in classes]
        listing = _listing(root, folders)
        datasets.append(_dataset(root, split, classes, listing, np.arange(len(listing.targets))))
    return datasets


def _listing(root: Path, folders: Sequence[Sequence[str]]) -> _Listing:
    """List the images in the folders of each class."""
    texts, lengths, hashes = [], [], []
    passed_over = Counter[str]()
    for of_class in folders:
        names = [os.fsencode(name) for folder in of_class for name in _images(root, folder, passed_over)]
        texts.append(b"".join(names))
        lengths.append(np.fromiter(map(len, names), np.int64, len(names)))
        hashes.append(np.frombuffer(b"".join(map(_hash, names)), ">u8"))
    ends = np.cumsum(np.concatenate([[0], *lengths]), dtype=np.int64)
    return _Listing(
        names=_Names(np.frombuffer(b"".join(texts), np.uint8), ends),
        targets=np.repeat(np.arange(len(folders), dtype=np.int32), [len(each) for each in lengths]),
        hashes=np.concatenate(hashes).astype(np.uint64),
        passed_over=dict(passed_over.most_common()),
    )


def _share(listing: _Listing, split: str) -> NDArray[np.int64]:
    """Select a tenth of each class, of two images or more at least one; or the others; or all."""
    order = np.lexsort((listing.hashes, listing.targets))
    counts = np.bincount(listing.targets)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    validation = np.where(counts > 1, np.maximum(1, counts // 10), 0)
    is_chosen = rank < np.repeat(validation, counts)
    return order if split == "all" else order[is_chosen if split == "validation" else ~is_chosen]


def _dataset(
    root: Path, split: str, classes: Sequence[str], listing: _Listing, numbers: NDArray[np.int64]
) -> FolderDataset:
    targets = listing.targets[numbers]
    empty = np.flatnonzero(np.bincount(targets, minlength=len(classes)) == 0)
    # A class with few images may have none for validation.
    if not len(numbers) and np.bincount(listing.targets, minlength=len(classes)).all():
        raise DataError(f"{root} has one image of each class, so none can be held out; add images.")
    if len(empty) and (split not in ("validation", "test") or not len(numbers)):
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise DataError(
            f"{root}, {split}: the class {classes[empty[0]]} has no images ({suffixes}); add some, or remove it."
        )
    numbers = numbers[np.argsort(listing.hashes[numbers], kind="stable")].astype(np.int64)  # groups are mixed
    return FolderDataset(
        root=root,
        split=split,
        class_names=tuple(map(composed, classes)),
        targets=listing.targets[numbers],
        _names=listing.names,
        _numbers=numbers,
        _hashes=listing.hashes[numbers],
        passed_over=listing.passed_over,
    )


def is_divided(place: str | os.PathLike[str]) -> bool:
    """Whether a folder of class folders is divided into training and validation."""
    folder = expanded(place, DataError)
    return folder.is_dir() and _divides(folder, _folders(folder))


def is_among(path: Path, place: str | os.PathLike[str]) -> bool:
    """Whether a path would be a class in a folder of class folders, or be searched for images of one."""
    if not is_class_folder(place):
        return False
    root = expanded(place, DataError)
    real = Path(os.path.realpath(path))  # resolve() fails for circular links
    for mine in (path.absolute(), real):  # also through links, and in other case if that is the same
        for above in (mine, *mine.parents):
            if not (above.exists() and above.samefile(root)):
                continue
            parts = mine.relative_to(above).parts
            if not parts:
                return True
            if not any(map(is_hidden, parts)):
                return not is_divided(root) or parts[0] in ("train", *_VALIDATION)
    return False


def _divides(folder: Path, below: set[str]) -> bool:
    """Whether its folder train is a split; it is a class if it directly has images and there is no other split."""
    if "train" not in below or below & {*_VALIDATION}:
        return "train" in below
    return bool(_folders(folder / "train")) or not any(map(_is_image, _some_of(folder / "train")))


def _folders(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name)}


def _classes(folder: Path, at_least: int = 2) -> list[str]:
    names = {name for name in _folders(folder) if not is_prepared(folder / name)}
    if len(names) < at_least:
        count = "two" if at_least == 2 else "one"
        named = "; a class cannot be called train beside one called val or test" if folder.name == "train" else ""
        raise DataError(f"{folder} has {len(names)} folders; a folder per class is needed, at least {count}{named}.")
    if unreadable := [name for name in names if not _is_text(name)]:
        raise DataError(f"{folder} has a folder {min(unreadable)!r}, whose name is not valid UTF-8; rename it.")
    if len({composed(name) for name in names}) < len(names):
        raise DataError(f"{folder} has two folders whose names look alike (two forms of Unicode); merge them.")
    return sorted(names, key=lambda name: os.fsencode(composed(name)))


def _is_text(name: str) -> bool:
    """Whether a name can be encoded: Linux accepts any bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def composed(name: str) -> str:
    """Return a name with one character for ä, where some macOS file systems and zip files have two."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _composed_bytes(name: bytes) -> bytes:
    return name if name.isascii() else os.fsencode(composed(os.fsdecode(name)))


def _images(root: Path, below: str, passed_over: Counter[str]) -> list[str]:
    """List images, but not hidden ones such as the ._photo.jpg beside each photo.jpg that macOS copies elsewhere.

    Other files are counted in ``passed_over``.
    """
    found = []
    for name, _ in files_below(root / below):
        if any(map(is_hidden, name.split("/"))):
            continue
        if _is_image(name):
            found.append(f"{below}/{name}")
        else:
            passed_over[PurePosixPath(name).suffix.lower()] += 1
    names = sorted(found, key=composed)
    if any(name.lower().endswith((".heic", ".heif")) for name in names) and find_spec("pillow_heif") is None:
        raise MissingExtraError(f"Reading the HEIF photographs in {root / below}", "heif")
    return names


def _hash(name: bytes) -> bytes:
    return hashlib.blake2b(_composed_bytes(name), digest_size=16).digest()[:8]
