"""Turn the archives of ImageNet-21K into shards: ``wn21k data prepare``.

Two passes of independent tasks, each of which puts its result in place whole or not at all:

1. a task per class reads its images, checks and resizes them, and writes a tar of finished records and a manifest part;
2. a task per shard gathers its records from the class tars, in an order fixed by a hash of their keys.

So it can be killed at any moment and resumes where it was, and the bytes depend only on the source and the options, not
on the number of workers, the engine, or the order in which tasks end. The price is space for the output twice over
while it runs; nothing of the source is copied, except a few classes at a time of a compressed archive.

What the paper leaves open is decided here and in :mod:`wn21k_zoo.training.encode`: names are those of files that end as
images do (published: .JPEG); if a path is in an archive twice, its last occurrence counts, as when unpacking;
validation images are the first names in byte order, whatever the locale; a class whose own archive is damaged is an
error at the end or, with ``allow_truncated``, is left out.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wn21k_zoo.errors import BadImagesError, DataOutputError, DataSourceError
from wn21k_zoo.exclusive import exclusive
from wn21k_zoo.files import THE_SYSTEMS, local_path, parse_json, replace, write_whole
from wn21k_zoo.training.classes import finished_classes, prepare_class
from wn21k_zoo.training.dry_run import check_space_before, check_space_during
from wn21k_zoo.training.extra import cv2, pa, pc
from wn21k_zoo.training.gather import read_part, write_manifest, write_shards
from wn21k_zoo.training.manifest import ClassResult, classes_csv, summary
from wn21k_zoo.training.options import PrepareOptions, Progress, Tasks, disk_full_as_error, warn_of_unused
from wn21k_zoo.training.shards import (
    INDEX_FOLDER,
    INFO_FILE,
    OPTIONS_FILE,
    WORK_FOLDER,
    DatasetInfo,
    Shard,
    is_prepared,
    read_info,
)
from wn21k_zoo.training.sources import TO_READ, ClassSource, Source, is_readable, open_source
from wn21k_zoo.training.tars import CorruptError, CutOffError
from wn21k_zoo.training.tasks import Engine

__all__ = ["PrepareOptions", "Progress", "prepare"]

_LOG = logging.getLogger(__name__)
_WORK_DONE = ".work.done"
_TRUNCATED = "truncated"
_SUSPECT = "suspect"  # a file in the work folder: what is finished may be wrong
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST)
_BY_SOURCE = "none: split and resized by the source"
_HIDDEN = (".DS_Store", "._*", ".fseventsd", ".Spotlight-V100", ".TemporaryItems", ".Trash*", ".nfs*")  # not a user's


def prepare(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    options: PrepareOptions | None = None,
    *,
    workers: int | None = None,
    engine: Engine = "local",
    ray_address: str | None = None,
    max_bad: float = 0.01,
    allow_truncated: bool = False,
    resume: bool = True,
    progress: Callable[[Progress], None] = lambda _: None,
) -> DatasetInfo:
    """Prepare ``source`` into the folder ``output``; resumes an earlier run with the same options.

    A class that is finished is read again if its size in bytes has changed.

    Args:
        source: Any layout of :mod:`wn21k_zoo.training.sources`.
        output: A new or empty folder, or one that this function began.
        options: What to make; default: as published.
        workers: Processes, or Ray tasks at a time. Default: all cores, of this machine or of the cluster.
        engine: ``local`` or ``ray``; the result is the same to the byte. On a cluster all nodes must see both paths.
        ray_address: Address of a running Ray cluster; default: ``RAY_ADDRESS``, else one on this machine.
        max_bad: Allowed share of images that cannot be used.
        allow_truncated: If an archive ends too early or has a wrong checksum, go on with what it has; the class it ends
            in is left out, as is each class whose own archive is damaged or cannot be read.
        resume: If false, delete what an unfinished run left first.
        progress: Called after each task.

    Returns:
        What ``_info.json`` in the output folder says.

    Raises:
        DataSourceError: The source is missing, of no known layout, damaged or cut off.
        DataOutputError: The output folder holds something else, was begun with other options, or is complete although
            ``resume`` is false.
        DiskSpaceError: Too little space; what is finished is kept.
        BadImagesError: More than ``max_bad`` of the images are bad; what is finished is kept.
    """
    source, output = local_path(source, DataSourceError, TO_READ), local_path(output, DataOutputError)
    if output.exists() and not output.is_dir():
        raise DataOutputError(f"{output} is a file; name a folder for the output.")
    tasks = Tasks(workers, engine, ray_address, progress)
    if engine == "ray":  # its workers run in another folder
        source, output = source.absolute(), output.absolute()
    shutil.rmtree(output / _WORK_DONE, ignore_errors=True)
    options = options or PrepareOptions()
    is_complete = (output / INFO_FILE).is_file() and not (output / WORK_FOLDER).exists()
    if is_complete and _is_gone(source):
        return _complete(output, options, None, resume, allow_truncated)
    opened = open_source(source)
    options = options.of(opened)
    recorded = _recorded(options, opened.is_split, opened.is_resized)
    if is_complete:
        return _complete(output, options, recorded, resume, allow_truncated)
    with disk_full_as_error(output), _begun(output, {**recorded, "source": source.resolve().name}, resume):
        check_space_before(opened, options, output)
        results, cut_off = _prepare_classes(opened, options, output, tasks, max_bad, allow_truncated)
        shards = write_shards(output, results, options, tasks)
        write_manifest(output, results, progress)
        warn_of_unused(opened)
        if linked := sum(one.linked_folders for one in results):
            _LOG.warning("%d links to folders within classes are not followed; manifest.parquet names them", linked)
        if lacks := _lacks(cut_off, results, options, output / WORK_FOLDER):
            recorded[_TRUNCATED] = lacks
        info = _finish(output, results, shards, options, recorded, list(opened.unused))
        progress(Progress(stage="manifest", done=len(results), total=len(results), images=0))
    try:
        # A half-deleted work folder cannot be resumed, so rename it first.
        replace(output / WORK_FOLDER, output / _WORK_DONE, patience=10)
    except PermissionError:  # on Windows, while something has it open
        _LOG.warning("%s is no longer needed, but could not be removed; remove it", output / WORK_FOLDER)
    shutil.rmtree(output / _WORK_DONE, ignore_errors=True)
    return info


def _recorded(options: PrepareOptions, is_split: bool, is_resized: bool) -> dict[str, Any]:
    """Return the options as ``_info.json`` has them, without those that do not apply to an already split source."""
    recorded = options.recorded()
    without = ("min_images", "val_per_class") * is_split + ("size",) * is_resized
    recorded = {name: value for name, value in recorded.items() if name not in without}
    if is_resized:
        recorded["resize"] = _BY_SOURCE
    return {**recorded, "opencv": cv2.__version__}


def _lacks(cut_off: CutOffError | None, results: Iterable[ClassResult], options: PrepareOptions, work: Path) -> str:
    """Say what is wrong with the source of an output for which that was allowed; '' if nothing is."""
    if (work / _SUSPECT).exists():  # perhaps of a former run, whose classes are kept
        return "a checksum of the source was wrong"
    if cut_off is not None:
        return "the source ended too early"
    damaged = len(_damaged(results, options))
    return f"class archives or folders that were damaged: {damaged:,}" if damaged else ""


def _is_gone(source: Path) -> bool:
    """Whether a source, or all that was in its folder but prepared data, was deleted."""
    with contextlib.suppress(OSError):  # which opening it explains
        if not source.is_dir():
            return not source.exists()
        return all(_is_the_systems(entry.name) or is_prepared(entry) for entry in source.iterdir())
    return False


def _complete(
    output: Path, options: PrepareOptions, recorded: dict[str, Any] | None, resume: bool, allow_truncated: bool
) -> DatasetInfo:
    """Return what a complete output says of itself; without ``recorded`` its source is gone.

    Raises:
        DataOutputError: It was made with other options, or the caller wants to make it anew or of a whole source.
    """
    info = read_info(output)
    before = dict(info.preparation)
    lacks = before.pop(_TRUNCATED, None)
    of_same = _recorded(options, "min_images" not in before, before.get("resize") == _BY_SOURCE)
    _check_same(before, recorded or of_same, output)
    if not resume or (lacks is not None and not allow_truncated):
        what = "is complete" if not resume else f"was made with --allow-truncated ({lacks})"
        raise DataOutputError(f"{output} {what}; delete it, or name another folder, to prepare the source anew.")
    _LOG.warning("%s was complete already%s; nothing was done", output, "" if recorded else ", and its source is gone")
    return info


def _check_same(before: dict[str, Any], now: dict[str, Any], output: Path) -> None:
    if before != now:
        differing = ", ".join(
            f"{name} {before.get(name)!r} then and {now.get(name)!r} now"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        )
        raise DataOutputError(
            f"{output} was begun with other settings ({differing}); use the same ones, name another folder, or delete "
            "this one."
        )


def _read(state: Path, output: Path) -> dict[str, Any]:
    try:
        content = parse_json(state.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DataOutputError(f"{state} is damaged; name another folder than {output}, or start anew (--no-resume).")
    return content


@contextlib.contextmanager
def _begun(output: Path, recorded: dict[str, Any], resume: bool) -> Iterator[None]:
    """Hold the output folder exclusively, with its work folders and without what killed tasks left."""
    work = output / WORK_FOLDER
    state = work / OPTIONS_FILE
    if output.exists() and not work.is_dir() and any(not _is_the_systems(entry.name) for entry in output.iterdir()):
        raise DataOutputError(f"{output} is not empty and not an output of `wn21k data prepare`; name a new folder.")
    folders = (work / "classes", work / "shards", work / "spool")
    try:
        work.mkdir(parents=True, exist_ok=True)
        busy = f"Another process is preparing {output}; wait for it, or name another folder."
        with exclusive(work / "lock", DataOutputError, "name another folder.", busy=busy):
            if (output / INFO_FILE).is_file() and not state.is_file():
                shutil.rmtree(work, ignore_errors=True)  # which this process made
                raise DataOutputError(f"Another process has just completed {output}; run the same command again.")
            if not resume:
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
                for path in (state, work / _SUSPECT):
                    path.unlink(missing_ok=True)
            if state.is_file():
                _check_same(_read(state, output), recorded, output)
            for folder in folders:
                folder.mkdir(exist_ok=True)
            write_whole(state, json.dumps(recorded, indent=1))
            for left in (
                *(work / "spool").iterdir(),
                *(path for at in (output, output / INDEX_FOLDER, *folders) for path in at.glob(".*.tmp")),
            ):
                left.unlink(missing_ok=True)
            yield
    except OSError as error:
        named = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(output)
        if error.errno not in _UNWRITABLE or not named:
            raise
        raise DataOutputError(f"{output} cannot be written ({error.strerror}); name a writable folder.") from None


def _is_the_systems(name: str) -> bool:
    return name in THE_SYSTEMS or any(fnmatch.fnmatchcase(name, pattern) for pattern in _HIDDEN)


def _prepare_classes(
    source: Source, options: PrepareOptions, output: Path, tasks: Tasks, max_bad: float, allow_truncated: bool
) -> tuple[list[ClassResult], CutOffError | None]:
    """First pass: prepare every class of the source that is not finished yet; also returns where it is cut off."""
    work = output / WORK_FOLDER
    there: set[str] = set()
    results = _kept(work, max_bad, allow_truncated)
    again = {one.name for one in _damaged(results.values(), options)}  # which may have been mended
    done = images = 0
    positions: dict[str, int] = {}
    cut_off: list[CutOffError] = []
    known = sum(result.source_bytes for result in results.values()) if not source.sequential else 0

    def wanted(name: str) -> bool:
        there.add(name)
        return not (source.sequential and name in results and name not in again)

    def waiting() -> Iterator[tuple[ClassSource, PrepareOptions, Path, bool]]:
        nonlocal known
        last = 0
        try:
            for one in source.classes(work / "spool", wanted):
                source.check_split(one)
                positions[one.name], last = one.position - last, one.position
                before = results.get(one.name)
                if before is None or before.source_bytes != one.num_bytes or (one.name in again and is_readable(one)):
                    _forget_shards(work)
                    if before is not None:  # killed halfway, its new records would have the former places
                        _forget([results.pop(one.name)], work)
                        known -= before.source_bytes if not source.sequential else 0
                    yield one, options, work / "classes", source.is_split
        except CutOffError as error:
            cut_off.append(error)

    tasks.progress(Progress(stage="classes", done=known, total=source.num_bytes, images=0))
    for result in tasks.run(prepare_class, waiting()):
        results[result.name] = result
        images += result.images
        done += positions[result.name]
        tasks.progress(Progress(stage="classes", done=known + done, total=source.num_bytes, images=images))
        if source.sequential and len(results) % 50 == 0:
            check_space_during(results.values(), done, source.num_bytes, output)
        if result.bad and images > 10_000:  # only such a class raises the share of bad images
            _refuse_bad(list(results.values()), 5 * max_bad, work)  # no need to wait for the end if it is that bad
    if cut_off:
        _refuse_cut_off(cut_off[0], results, work, allow_truncated)
    else:
        _refuse_gone([results[name] for name in sorted(results.keys() - there)], work)
        results = {name: result for name, result in results.items() if name in there}
    if not allow_truncated:
        _refuse_damaged(results.values(), options)
    _refuse_bad(list(results.values()), max_bad, work)
    _refuse_nothing(list(results.values()), source, options, work)
    return [results[name] for name in sorted(results)], cut_off[0] if cut_off else None


def _refuse_nothing(results: Sequence[ClassResult], source: Source, options: PrepareOptions, work: Path) -> None:
    """Refuse a source of which no image would be used."""
    if any(result.used for result in results):
        return
    for folder in ("classes", "shards"):  # nothing is lost, and other options may follow
        shutil.rmtree(work / folder, ignore_errors=True)
    for file in (OPTIONS_FILE, _SUSPECT):
        (work / file).unlink(missing_ok=True)
    fewer = Counter(result.decision for result in results if result.decision != "kept")
    why = [f"{count:,} classes: {decision}" for decision, count in sorted(fewer.items())]
    if unusable := sum(result.bad for result in results if result.decision == "kept"):
        why.append(f"{unusable:,} images that cannot be used")
    beside = f"; beside them {', '.join(list(source.unused)[:3])}" if source.unused else ""
    check = f" Check --label-space and --min-images, which is {options.min_images}."
    advice = check if {*fewer} - {"damaged archive"} else ""
    raise DataSourceError(
        f"No image of the source is to be used: {'; '.join(why) or 'no images in it'}{beside}.{advice}"
    )


def _refuse_gone(gone: Sequence[ClassResult], work: Path) -> None:
    """Refuse a source that lacks classes with images in the output; forget others."""
    if used := [result.name for result in gone if result.used]:
        more = f" and {len(used) - 3:,} more" if len(used) > 3 else ""
        raise DataSourceError(
            f"Classes that are finished are no longer in the source: {', '.join(used[:3])}{more}. Put them back, or "
            "start anew (--no-resume)."
        )
    _forget(gone, work)


def _kept(work: Path, max_bad: float, allow_truncated: bool) -> dict[str, ClassResult]:
    """Return the finished classes without those whose images the last run complained of; they may be mended now."""
    results = {result.name: result for result in finished_classes(work / "classes")}
    again: list[ClassResult] = []
    is_suspect = (work / _SUSPECT).exists() and not allow_truncated
    if is_suspect:
        again = [*results.values()]
    elif _bad(results.values(), max_bad):
        again = [one for one in results.values() if one.decision == "kept" and one.bad]
    _forget(again, work)
    if is_suspect or not results:
        (work / _SUSPECT).unlink(missing_ok=True)
    for one in again:
        del results[one.name]
    return results


def _forget(results: Sequence[ClassResult], work: Path) -> None:
    """Delete finished classes, so that the next run reads them again."""
    for result in results:
        for path in (work / "classes" / f"{result.name}.parquet", work / "classes" / f"{result.name}.tar"):
            path.unlink(missing_ok=True)
    if results:
        _forget_shards(work)


def _forget_shards(work: Path) -> None:
    """Delete what says which shards are finished, since their classes will differ."""
    for receipt in (work / "shards").iterdir():
        receipt.unlink()


def _refuse_cut_off(error: CutOffError, results: Mapping[str, ClassResult], work: Path, allow_truncated: bool) -> None:
    about = str(error).rstrip(".")
    if isinstance(error, CorruptError):
        (work / _SUSPECT).touch()
    if allow_truncated:
        return
    if isinstance(error, CorruptError):
        raise DataSourceError(
            f"{about}. What was read before may be wrong as well: get the file anew and run the same command again, "
            "which reads all of it; or use what could be read with --allow-truncated."
        )
    raise DataSourceError(
        f"{about}. {len(results):,} classes are finished and kept: get the whole file and run the same command again, "
        "or go on without the rest with --allow-truncated."
    )


def _damaged(results: Iterable[ClassResult], options: PrepareOptions) -> list[ClassResult]:
    return [one for one in results if one.decision == "damaged archive" and one.wnid in options.space]


def _refuse_damaged(results: Iterable[ClassResult], options: PrepareOptions) -> None:
    if damaged := _damaged(results, options):
        names = ", ".join(sorted(one.name for one in damaged)[:5])
        more = f" and {len(damaged) - 5:,} more" if len(damaged) > 5 else ""
        raise DataSourceError(
            f"These class archives or folders are damaged, were not fetched whole or may not be read: {names}{more}. "
            "The others are finished and kept: mend these and run the same command again, or go on without them with "
            "--allow-truncated."
        )


def _bad(results: Iterable[ClassResult], max_bad: float) -> bool:
    """Whether more than ``max_bad`` of the images cannot be used; damaged archives are another matter."""
    used = [one for one in results if one.decision == "kept"]
    return sum(one.bad for one in used) > max_bad * sum(one.images for one in used)


def _refuse_bad(results: list[ClassResult], max_bad: float, work: Path) -> None:
    if not _bad(results, max_bad):
        return
    used = [one for one in results if one.decision == "kept"]
    reasons = Counter[str]()
    for one in used:
        reasons.update(one.reasons)
    most = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3))
    broken = next(one for one in used if one.bad)
    part = read_part(work, broken.name, ["name", "reason"])
    first = part.filter(pc.is_in(part["reason"], pa.array(list(broken.reasons))))["name"][0]
    raise BadImagesError(
        f"{sum(one.bad for one in used):,} of {sum(one.images for one in used):,} images cannot be used ({most}), such "
        f"as {first} of {broken.name}; that is more than {max_bad:.1%}. Finished work is kept: mend the source, or run "
        "again with a higher --max-bad."
    )


def _finish(
    output: Path,
    results: list[ClassResult],
    shards: dict[str, tuple[Shard, ...]],
    options: PrepareOptions,
    recorded: dict[str, Any],
    unused: list[str],
) -> DatasetInfo:
    """Write the summary and, last, ``_info.json``, which marks the output as complete."""
    space = options.space
    write_whole(output / "classes.csv", classes_csv(results))
    write_whole(output / "SUMMARY.md", summary(results, space, recorded, unused))
    info = DatasetInfo(
        label_space=space.name,
        label_digest=space.digest,
        splits=shards,
        preparation=recorded,
        wnids=None if space.is_shipped else space.wnids,
    )
    write_whole(output / INFO_FILE, info.to_json())
    return info
