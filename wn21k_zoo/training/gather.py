"""Second pass of data preparation: gather the finished records of all classes into shards, in pseudorandom order."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.errors import DataOutputError
from wn21k_zoo.files import atomic_file, visible, write_whole
from wn21k_zoo.training.extra import pa, pc, pq
from wn21k_zoo.training.manifest import DAMAGES, MANIFEST_SCHEMA, ClassResult, read_table
from wn21k_zoo.training.options import PrepareOptions, Progress, Tasks, disk_full_as_error
from wn21k_zoo.training.shards import (
    BLOCK,
    END_OF_TAR,
    INDEX_DTYPE,
    MANIFEST_FILE,
    WORK_FOLDER,
    Shard,
    index_path,
    read_fully,
    shard_name,
    write_index,
)

__all__ = ["read_part", "write_manifest", "write_shard", "write_shards"]

_SPLITS = ("train", "validation")
_ROW_GROUP = 200_000
_ORDER_DTYPE = np.dtype(
    [
        ("order", "<u8"), ("start", "<u8"), ("length", "<u4"), ("stored_bytes", "<u4"), ("part", "<u4"),
        ("target", "<i4"),
    ]
)  # fmt: skip


def write_shards(
    output: Path, results: list[ClassResult], options: PrepareOptions, tasks: Tasks
) -> dict[str, tuple[Shard, ...]]:
    """Write all shards that are not finished yet."""
    work = output / WORK_FOLDER
    names = [result.name for result in results]
    planned: list[tuple[str, int, int, int]] = []  # split, number of the shard, its first sample, its length
    read = 0

    def tell() -> None:
        nonlocal read
        tasks.progress(Progress(stage="sort", done=read, total=2 * len(_SPLITS) * len(results), images=0))
        read += 1

    tell()
    for split in _SPLITS:
        lengths = _sort(work, results, split, options, tell)
        ends = np.cumsum(lengths)
        planned += [
            (split, number, int(end - length), int(length))
            for number, (end, length) in enumerate(zip(ends, lengths, strict=True))
        ]
    finished = dict(_receipts(work / "shards"))
    for path in visible(output, "*.tar"):  # of an unfinished run that planned other shards
        if path.stem not in finished:
            path.unlink()
            index_path(path).unlink(missing_ok=True)
    open_tasks = [
        (output, names, split, number, first, length)
        for split, number, first, length in planned
        if shard_name(split, number).removesuffix(".tar") not in finished
    ]
    done = len(planned) - len(open_tasks)
    samples = 0
    tasks.progress(Progress(stage="shards", done=done, total=len(planned), images=0))
    for written in tasks.run(write_shard, iter(open_tasks)):
        done += 1
        samples += written
        tasks.progress(Progress(stage="shards", done=done, total=len(planned), images=samples))
    written_shards = dict(_receipts(work / "shards"))
    shards: dict[str, tuple[Shard, ...]] = {}
    for split, number, *_ in planned:  # in order
        shards[split] = (*shards.get(split, ()), written_shards[shard_name(split, number).removesuffix(".tar")])
    return shards


def _receipts(folder: Path) -> Iterator[tuple[str, Shard]]:
    """Read what is known of the finished shards, by their names without suffix; what is damaged is not finished."""
    for path in visible(folder, "*.json"):
        with contextlib.suppress(ValueError, TypeError):
            yield path.stem, Shard(**json.loads(path.read_text(encoding="utf-8")))


def _sort(
    work: Path, results: list[ClassResult], split: str, options: PrepareOptions, tell: Callable[[], None]
) -> NDArray[np.int64]:
    """Distribute the samples of a split over its shards by their hashes; returns the shards' lengths.

    Writes ``SPLIT.order.npy``, the samples shard by shard (unsorted within one), and ``SPLIT.bounds.npy``, the smallest
    hash of each shard. Only the hashes are held in memory, 8 bytes per sample.
    """
    found = [
        np.empty(0, np.uint64),
        *(table["order"].to_numpy() for _, table in _samples(work, results, split, ["order"], tell)),
    ]
    hashes = np.sort(np.concatenate(found))
    bounds = hashes[:: options.shard_size]
    lengths = np.diff(np.searchsorted(hashes, bounds), append=len(hashes)).astype(np.int64)
    free = np.cumsum(lengths) - lengths  # the next free place of each shard
    columns = ["order", "start", "length", "stored_bytes"]
    with atomic_file(work / f"{split}.bounds.npy") as file:
        np.save(file, bounds, allow_pickle=False)
    order = np.lib.format.open_memmap(work / f"{split}.order.npy", "w+", _ORDER_DTYPE, (len(hashes),))
    labels = options.space.index
    try:
        for part, table in _samples(work, results, split, columns, tell):
            shard = np.searchsorted(bounds, table["order"].to_numpy(), side="right") - 1
            grouped = np.argsort(shard, kind="stable")
            counts = np.bincount(shard, minlength=len(bounds))
            within = np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)
            places = free[shard[grouped]] + within
            free += counts
            for column in columns:
                order[column][places] = table[column].to_numpy()[grouped]
            order["part"][places] = part
            order["target"][places] = labels[results[part].wnid]
        order.flush()
    finally:
        del order  # a traceback would keep the file open, which Windows then neither rewrites nor removes
    return lengths


def _samples(
    work: Path, results: list[ClassResult], split: str, columns: list[str], tell: Callable[[], None]
) -> Iterator[tuple[int, pa.Table]]:
    for part, result in enumerate(results):
        tell()
        if getattr(result, split):
            table = read_part(work, result.name, ["split", *columns])
            yield part, table.filter(pc.equal(table["split"], split))


def read_part(work: Path, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read the manifest part of a finished class; one that is damaged is removed, so that the next run does it again.

    Raises:
        DataOutputError: It is damaged.
    """
    path = work / "classes" / f"{name}.parquet"
    try:
        table = read_table(path, columns, page_checksum_verification=True)
        if not {*(columns or ())} - {*table.column_names}:
            return table
    except FileNotFoundError:
        raise _damaged(path) from None
    except DAMAGES as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; the file may be whole
            raise
    path.unlink(missing_ok=True)
    raise _damaged(path)


def _damaged(path: Path) -> DataOutputError:
    return DataOutputError(f"{path} has been damaged since it was written; run the same command again.")


def write_shard(output: Path, names: list[str], split: str, number: int, first: int, length: int) -> int:
    """Gather one shard from the class tars, as a task; returns its number of samples."""
    work = output / WORK_FOLDER
    order = np.load(work / f"{split}.order.npy", mmap_mode="r", allow_pickle=False)[first : first + length]
    order = np.sort(order, order=["order", "part", "start"])
    index = np.empty(len(order), INDEX_DTYPE)
    digest = hashlib.sha256()
    path = output / shard_name(split, number)
    size = 0
    with disk_full_as_error(output):
        with atomic_file(path) as file:
            for position, entry in enumerate(order):
                of_class, record = work / "classes" / f"{names[entry['part']]}.tar", b""
                with contextlib.suppress(FileNotFoundError), of_class.open("rb", buffering=0) as records:
                    records.seek(int(entry["start"]))
                    record = read_fully(records, int(entry["length"]))
                if len(record) != entry["length"]:
                    of_class.with_suffix(".parquet").unlink(missing_ok=True)
                    raise _damaged(of_class)
                index[position] = (size + BLOCK, entry["stored_bytes"], entry["target"])
                digest.update(record)
                size += file.write(record)
            digest.update(END_OF_TAR)
            size += file.write(END_OF_TAR)
        write_index(index_path(path), index)
        shard = Shard(name=path.name, num_samples=len(order), num_bytes=size, sha256=digest.hexdigest())
        write_whole(work / "shards" / f"{path.stem}.json", json.dumps(asdict(shard)))
    return len(order)


def write_manifest(output: Path, results: list[ClassResult], progress: Callable[[Progress], None]) -> None:
    """Write all parts as one file, with the shard that each image went to."""
    work = output / WORK_FOLDER
    bounds = {split: np.load(work / f"{split}.bounds.npy", allow_pickle=False) for split in _SPLITS}
    with (
        atomic_file(output / MANIFEST_FILE) as file,
        pq.ParquetWriter(file, MANIFEST_SCHEMA, compression="zstd") as writer,
    ):
        waiting: list[pa.Table] = []
        for number, result in enumerate(results, start=1):
            progress(Progress(stage="manifest", done=number - 1, total=len(results), images=0))
            table = read_part(work, result.name)
            table = table.append_column("shard", pa.array(_shard_of_each(table, bounds), pa.string()))
            waiting.append(table.select(MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA))
            if sum(map(len, waiting)) >= _ROW_GROUP or number == len(results):  # one group per class would be 21,841
                writer.write_table(pa.concat_tables(waiting), row_group_size=_ROW_GROUP)
                waiting.clear()


def _shard_of_each(table: pa.Table, bounds: dict[str, NDArray[np.uint64]]) -> NDArray[np.object_]:
    """The shard that each image of a part went to; None if it is not used."""
    shards = np.full(len(table), None, object)
    splits = np.array(table["split"].to_pylist(), object)
    orders = pc.fill_null(table["order"], 0).to_numpy()  # as uint64: float64 would round them
    for split, least in bounds.items():
        mine = np.flatnonzero(splits == split)
        names = _shard_names(split, len(least))
        shards[mine] = names[np.searchsorted(least, orders[mine], side="right") - 1]
    return shards


@functools.lru_cache(maxsize=2)
def _shard_names(split: str, count: int) -> NDArray[np.object_]:
    return np.array([shard_name(split, number) for number in range(count)], object)
