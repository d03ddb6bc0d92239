"""What data preparation would produce, and whether there is room for it."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from wn21k_zoo.errors import DataSourceError, DiskSpaceError
from wn21k_zoo.files import local_path
from wn21k_zoo.training.classes import decide, read_or_bad
from wn21k_zoo.training.encode import BadImageError, store_image
from wn21k_zoo.training.manifest import ClassResult, Decision
from wn21k_zoo.training.options import PrepareOptions, Progress, Tasks, warn_of_unused
from wn21k_zoo.training.shards import WORK_FOLDER
from wn21k_zoo.training.sources import TO_READ, ClassSource, Source, member_reader, open_source, read_members
from wn21k_zoo.training.tars import CutOffError
from wn21k_zoo.training.tasks import Engine

__all__ = ["ClassCount", "check_space_before", "check_space_during", "count", "count_class"]

_RECORD_OVERHEAD = 2816  # of three tar members, without the image: headers, .cls, .json, half a block of padding


@dataclass(frozen=True, kw_only=True)
class ClassCount:
    """What a class would become; the bytes are extrapolated from its first image."""

    wnid: str
    decision: Decision
    train: int = 0
    validation: int = 0
    source_bytes: int
    stored_bytes: int = 0


def count(
    source: str | os.PathLike[str],
    options: PrepareOptions | None = None,
    *,
    workers: int | None = None,
    engine: Engine = "local",
    ray_address: str | None = None,
    allow_truncated: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> list[ClassCount]:
    """Estimate what a preparation would make of the source, from its names and one image per class.

    Args:
        source: As for :func:`prepare`, like the other arguments.
        options: Options of the preparation.
        workers: Number of processes or Ray tasks.
        engine: ``local`` or ``ray``.
        ray_address: Address of a Ray cluster.
        allow_truncated: Count what is there if an archive ends too early.
        progress: Called after each class.

    Raises:
        DataSourceError: As :func:`prepare`.
        DiskSpaceError: The folder for temporary files is full.
    """
    source, options = local_path(source, DataSourceError, TO_READ), options or PrepareOptions()
    opened = open_source(source.absolute() if engine == "ray" else source)  # Ray's workers run in another folder
    options = options.of(opened)
    if opened.sequential:  # classes are copied to this machine's disk, which no other machine sees
        engine, ray_address = "local", None
    tasks = Tasks(workers, engine, ray_address, progress)
    counts: list[ClassCount] = []
    done = images = 0
    positions: list[int] = []

    def waiting(spool: Path) -> Iterator[tuple[ClassSource, PrepareOptions, bool]]:
        try:
            for one in opened.classes(spool, lambda _: True):
                positions.append(one.position)
                opened.check_split(one)
                yield one, options, opened.is_split
        except CutOffError as error:
            if not allow_truncated:
                raise DataSourceError(
                    f"{str(error).rstrip('.')}: get the whole file, or count without the rest with --allow-truncated."
                ) from None

    try:
        with tempfile.TemporaryDirectory(prefix="wn21k-", ignore_cleanup_errors=True) as spool:
            for one in tasks.run(count_class, waiting(Path(spool))):
                counts.append(one)
                images += one.train + one.validation
                done = positions[len(counts) - 1]
                progress(Progress(stage="classes", done=done, total=opened.num_bytes, images=images))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskSpaceError(
            f"No space is left in {tempfile.gettempdir()}, to which classes are copied to be counted; set TMPDIR to a "
            "folder on another disk."
        ) from None
    warn_of_unused(opened)
    return sorted(counts, key=lambda one: one.wnid)


def count_class(source: ClassSource, options: PrepareOptions, is_split: bool) -> ClassCount:
    """Count one class; runs as a task."""
    try:
        names = {member.inner for member in read_members(source) if member.refused is None}
        decision = decide(source, len(names), options, is_split)
        kept = len(names) if decision == "kept" else 0
        first = _first_stored_bytes(source, options) if kept else 0
    except DataSourceError:
        return ClassCount(wnid=source.wnid, decision="damaged archive", source_bytes=source.num_bytes)
    finally:
        if source.spooled:
            source.path.unlink(missing_ok=True)
    validation = min(kept, options.val_per_class) if not is_split else kept * (source.split == "validation")
    return ClassCount(
        wnid=source.wnid,
        decision=decision,
        train=kept - validation,
        validation=validation,
        source_bytes=source.num_bytes,
        stored_bytes=kept * (first + _RECORD_OVERHEAD),
    )


def _first_stored_bytes(source: ClassSource, options: PrepareOptions) -> int:
    with member_reader() as read:
        for member in read_members(source):
            if member.refused is None:
                with contextlib.suppress(BadImageError):
                    return len(
                        store_image(read_or_bad(read, member), options.size, options.resize, options.quality).data
                    )
    return 0


def check_space_before(source: Source, options: PrepareOptions, output: Path) -> None:
    """Refuse output that will not fit, judged by one image each of up to 32 classes.

    Raises:
        DiskSpaceError: There is too little space.
    """
    if source.sequential:
        return  # it cannot be read beforehand; check_space_during checks it
    work = output / WORK_FOLDER
    classes: list[ClassSource] = []
    with contextlib.suppress(DataSourceError):  # a truncated archive is reported when its classes are prepared
        for one in source.classes(work / "spool", lambda name: name[-9:] in options.space):
            classes.append(one)
    counts = [count_class(one, options, source.is_split) for one in classes[:: -(-len(classes) // 32) or 1]]
    read = sum(count.source_bytes for count in counts)
    stored = sum(count.stored_bytes for count in counts)
    if read:
        done = itertools.chain((work / "classes").iterdir(), output.glob("*.tar"))
        have = sum(path.stat().st_size for path in done)
        _refuse_space(stored / read * sum(one.num_bytes for one in classes), have, output)


def check_space_during(results: Iterable[ClassResult], done: int, total: int, output: Path) -> None:
    """Do the same for a source that cannot be read beforehand, judged by what is done so far."""
    stored = sum(result.stored_bytes for result in results)
    _refuse_space(stored / done * total, stored, output)


def _refuse_space(expected: float, have: int, output: Path) -> None:
    free = shutil.disk_usage(output).free
    if 2 * expected - have > free:
        raise DiskSpaceError(
            f"About {(2 * expected - have) / 1e9:,.3g} GB more are needed at {output}, but {free / 1e9:,.3g} GB are "
            f"free (the output takes about {expected / 1e9:,.3g} GB, and as much again while it is being made). What "
            "is finished is kept: make room, or use another disk."
        )
