"""Inspect prepared shards: their contents, their images, and whether they are still as written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from wn21k_zoo.errors import DataError, UnknownSynsetError, did_you_mean
from wn21k_zoo.files import expanded, sha256_of, visible
from wn21k_zoo.images import FORMATS
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.extra import pa, pc, pq
from wn21k_zoo.training.manifest import read_table
from wn21k_zoo.training.shards import (
    BLOCK,
    MANIFEST_FILE,
    DatasetInfo,
    Shard,
    count_targets,
    index_path,
    load_index,
    read_index,
    read_info,
)
from wn21k_zoo.tree import SemanticTree

__all__ = ["Damage", "contact_sheet", "describe", "verify_shards"]


def describe(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return counts, sizes, imbalance and classes per depth of a prepared folder.

    Returns:
        ``label_space`` and ``preparation``; ``splits``: per split the images, classes, bytes, shards, the fewest,
        median and most images of a class, and ``imbalance``, the most over the fewest; ``depths``: per depth of the
        label space's semantic tree the classes, those with training images, and the number of these images.

    Raises:
        DataError: The folder is not a prepared one, or is damaged.
    """
    folder = expanded(folder, DataError)
    info = read_info(folder)
    space = info.space
    described: dict[str, Any] = {"label_space": info.label_space, "preparation": info.preparation, "splits": {}}
    counts = {split: _class_counts(folder, shards, len(space)) for split, shards in info.splits.items()}
    for split, shards in info.splits.items():
        there = counts[split][counts[split] > 0]
        described["splits"][split] = {
            "images": int(there.sum()),
            "classes": len(there),
            "bytes": sum(shard.num_bytes for shard in shards),
            "shards": len(shards),
            "fewest": int(there.min()),
            "median": float(np.median(there)),
            "most": int(there.max()),
            "imbalance": round(float(there.max() / there.min()), 1),
        }
    train = counts.get("train", np.zeros(len(space), np.int64))
    tree = SemanticTree.from_label_space(space)
    described["depths"] = [
        {
            "depth": depth,
            "classes": len(nodes),
            "with_images": int((train[nodes] > 0).sum()),
            "images": int(train[nodes].sum()),
        }
        for depth in range(int(tree.depths.max()) + 1)
        for nodes in [np.flatnonzero(tree.depths == depth)]
    ]
    return described


def _class_counts(folder: Path, shards: tuple[Shard, ...], classes: int) -> NDArray[np.int64]:
    indexes = ((each.name, read_index(index_path(folder / each.name), each.num_samples)) for each in shards)
    return count_targets(((name, index["target"]) for name, index in indexes), classes)


def contact_sheet(
    folder: str | os.PathLike[str], synset: str | None, split: str = "train", count: int = 48, columns: int = 8
) -> Image.Image:
    """Draw the first images of a class, or of all classes, as one picture.

    Args:
        folder: A prepared folder.
        synset: A wnid; None for images of all classes, in the order of the shards.
        split: The split to take images from.
        count: Maximum number of images.
        columns: Images per row.

    Raises:
        UnknownSynsetError: The class is unknown or has no image.
        DataError: There is no such split, or the folder is not a prepared one.
    """
    folder = expanded(folder, DataError)
    info = read_info(folder)
    space = info.space
    if split not in info.splits:
        raise DataError(f"{folder} has no split {split!r}; its splits are {', '.join(info.splits)}.")
    if synset is not None and synset not in space:
        raise UnknownSynsetError(f"{synset} is not a class of {space.name}.{did_you_mean(synset, space.wnids)}")
    target = space.index[synset] if synset is not None else None
    found = list(itertools.islice(_images(folder, info.splits[split], target), count))
    if not found:
        raise UnknownSynsetError(f"{folder}, split {split}, has no image of {synset}.")
    side, line = 112, 14
    rows = -(-len(found) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + line + 4) + 4 + 20), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    title = f"{split}: all classes" if target is None else f"{split}: {synset} {space.names[target]}"
    draw.text((4, 4), title, "black", font=ImageFont.load_default(12))
    for place, (name, data, here) in enumerate(found):
        x, y = 4 + place % columns * (side + 4), 24 + place // columns * (side + line + 4)
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                image.draft("RGB", (side, side))
                sheet.paste(image.convert("RGB").resize((side, side)), (x, y))
        except Exception:  # Pillow raises many kinds of error
            draw.text((x, y), "damaged", "red", font=font)
        known = target is None and 0 <= here < len(space)
        caption = space.names[here] if known else name.removesuffix(".jpg")
        draw.text((x, y + side), _shortened(caption, font, side), "black", font=font)
    return sheet


def _shortened(text: str, font: Any, width: int) -> str:
    while text and font.getlength(text) > width:
        text = text[:-1]
    return text


def _images(folder: Path, shards: tuple[Shard, ...], target: int | None) -> Iterator[tuple[str, bytes, int]]:
    for shard in shards:
        index = read_index(index_path(folder / shard.name), shard.num_samples)
        chosen = index if target is None else index[index["target"] == target]
        try:
            with (folder / shard.name).open("rb") as file:
                for entry in chosen:
                    name = _header_at(file, int(entry["offset"]) - BLOCK)[0].decode()
                    yield name, file.read(int(entry["size"])), int(entry["target"])
        except (OSError, ValueError, OverflowError) as error:  # of a damaged index
            raise DataError(f"{shard.name} cannot be read ({error}); run `wn21k data verify`.") from None


_NAMES = ["sha256", "key"]


@dataclass(frozen=True)
class Damage:
    """A problem with a file of a prepared folder; ``key`` is the image, where one can be named."""

    file: str
    key: str | None
    problem: str


def verify_shards(
    folder: str | os.PathLike[str], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Damage]:
    """Check shards against their sha256, indexes against shards, both against the manifest and the label space.

    Where a shard's hash is wrong, its images are compared one by one with the manifest to name the damaged ones, if its
    index can be read.

    Args:
        folder: A prepared folder.
        progress: Called with the bytes read so far and in all.

    Raises:
        DataError: The folder is not a prepared one.
    """
    folder = expanded(folder, DataError)
    info = read_info(folder)
    found: list[Damage] = []
    space = info.space
    if space.digest != info.label_digest:
        found.append(Damage("_info.json", None, f"its digest is not that of the classes of {space.name}"))
    try:
        manifest: _Manifest | None = _Manifest.read(folder / MANIFEST_FILE, space)
    except Exception as error:  # pyarrow may raise anything on a damaged file
        manifest = None
        found.append(Damage(MANIFEST_FILE, None, f"cannot be read: {error}"))
    shards = [(split, shard) for split, shards in info.splits.items() for shard in shards]
    total, done = sum(shard.num_bytes for _, shard in shards), 0
    for split, shard in shards:
        found += _verify_shard(folder, shard, split, manifest, space)
        done += shard.num_bytes
        progress(done, total)
    known = {shard.name for _, shard in shards}
    found += [
        Damage(path.name, None, "is in no split of _info.json")
        for path in visible(folder, "*.tar")
        if path.name not in known
    ]
    if manifest is not None:
        _compare_counts(info, manifest, found)
    return found


@dataclass(frozen=True)
class _Manifest:
    """The rows of used images: target and split of each, and the rows of each shard."""

    path: Path
    targets: NDArray[np.int32]
    splits: NDArray[np.object_]
    of_shard: dict[str, NDArray[np.int64]]

    @classmethod
    def read(cls, path: Path, space: LabelSpace) -> _Manifest:
        columns = ["synset", "split", "shard"]
        # Not by filters=, with which Arrow 26 waits forever for a column whose stated type is damaged.
        table = read_table(path, columns=columns, read_dictionary=columns).filter(pc.field("shard").is_valid())
        synsets, splits, shards = (table[column].unify_dictionaries().combine_chunks() for column in columns)
        targets = np.array([space.index.get(wnid, 0) for wnid in synsets.dictionary.to_pylist()], np.int32)
        numbers = shards.indices.to_numpy()
        order = np.argsort(numbers, kind="stable")
        ends = np.cumsum(np.bincount(numbers, minlength=len(shards.dictionary)))
        with path.open("rb") as opened, pq.ParquetFile(opened) as file:
            for group in range(file.num_row_groups):  # check that they can be read; kept, they take much memory
                file.read_row_group(group, columns=_NAMES)
        return cls(
            path=path,
            targets=targets[synsets.indices.to_numpy()],
            splits=np.array(splits.dictionary.to_pylist(), object)[splits.indices.to_numpy()],
            of_shard=dict(zip(shards.dictionary.to_pylist(), np.split(order, ends)[:-1], strict=True)),
        )

    @functools.cached_property
    def names(self) -> Any:
        """A table of each row's hash and key."""
        with self.path.open("rb") as opened, pq.ParquetFile(opened) as file:  # in parts, to hold less at a time
            groups = (file.read_row_group(group, columns=[*_NAMES, "shard"]) for group in range(file.num_row_groups))
            kept = [each.filter(pc.field("shard").is_valid()).select(_NAMES) for each in groups]
            return pa.concat_tables(kept or [file.schema_arrow.empty_table()])


def _compare_counts(info: DatasetInfo, manifest: _Manifest, found: list[Damage]) -> None:
    for split, shards in info.splits.items():
        stated = sum(shard.num_samples for shard in shards)
        listed = int((manifest.splits == split).sum())
        if stated != listed:
            found.append(Damage(MANIFEST_FILE, None, f"lists {listed:,} images of {split}, _info.json says {stated:,}"))


def _verify_shard(
    folder: Path, shard: Shard, split: str, manifest: _Manifest | None, space: LabelSpace
) -> Iterator[Damage]:
    path = folder / shard.name
    try:
        digest = sha256_of(path)
    except OSError as error:
        yield Damage(shard.name, None, f"cannot be read: {error.strerror}")
        digest = ""
    if digest and digest != shard.sha256:
        yield Damage(shard.name, None, f"has sha256 {digest}, expected {shard.sha256}")
    name = index_path(path).relative_to(folder).as_posix()
    try:
        index = load_index(index_path(path), shard.num_samples)
    except ValueError as error:
        yield Damage(name, None, str(error))
        return
    outside = int(((index["target"] < 0) | (index["target"] >= len(space))).sum())
    if outside:
        yield Damage(shard.name, None, f"{outside:,} class indices are outside the label space")
    beyond = int((index["offset"] > shard.num_bytes - index["size"].astype(np.int64)).sum())
    if beyond:
        yield Damage(name, None, f"places {beyond:,} images beyond the end of {shard.name}")
    if manifest is None or not digest:
        return
    rows = manifest.of_shard.get(shard.name, np.empty(0, np.int64))
    if len(rows) != shard.num_samples:
        yield Damage(shard.name, None, f"holds {shard.num_samples:,} images, the manifest lists {len(rows):,} in it")
    if digest == shard.sha256 and not outside:
        if (manifest.splits[rows] != split).any():
            yield Damage(shard.name, None, f"has images that the manifest does not count as {split}")
        listed, there = (
            np.bincount(targets, minlength=len(space)) for targets in (manifest.targets[rows], index["target"])
        )
        if not beyond and (wrong := _count_wrong(path, index)):
            problem = f"does not fit {shard.name}: place, size or class of {wrong:,} of {len(index):,} images"
            yield Damage(name, None, problem)
        elif not np.array_equal(there, listed):
            yield Damage(shard.name, None, "its classes are not those that the manifest lists")
        return
    names = manifest.names.take(rows)
    whole: Counter[str] = Counter()
    with path.open("rb") as file:
        for entry in index:
            with contextlib.suppress(OSError, ValueError, OverflowError):  # the index may be what is damaged
                file.seek(int(entry["offset"]))
                whole[hashlib.sha256(file.read(int(entry["size"]))).hexdigest()] += 1
    wanted = Counter(names["sha256"].to_pylist())
    for key, digest in sorted(zip(names["key"].to_pylist(), names["sha256"].to_pylist(), strict=True)):
        if whole[digest] < wanted[digest]:
            equal = f", or another of {wanted[digest]} identical ones" if wanted[digest] > 1 else ""
            yield Damage(shard.name, key, f"the image is damaged{equal}")


def _count_wrong(path: Path, index: NDArray[np.void]) -> int:
    """Count the entries of an index whose place, size or class is not that of an image in the undamaged tar."""
    right = set()
    with path.open("rb") as file:
        for offset, size, target in index.tolist():
            with contextlib.suppress(OSError, ValueError, OverflowError):
                image, length = _header_at(file, offset - BLOCK)
                label, digits = _header_at(file, offset + size + -size % BLOCK)
                fits = length == size and label == image.removesuffix(b".jpg") + b".cls"
                if fits and int(file.read(min(digits, 20))) == target:
                    right.add(offset)
    return len(index) - len(right)


def _header_at(file: BinaryIO, offset: int) -> tuple[bytes, int]:
    """Name and size in a header of an undamaged tar of ours; tarfile, which reads any tar, takes much longer.

    Raises:
        ValueError: There is no header.
    """
    file.seek(offset)
    header = file.read(BLOCK)
    if header[257:262] != b"ustar":
        raise ValueError("no header")
    return header[:100].rstrip(b"\0"), int(header[124:135], 8)
