"""First pass of data preparation: turn a source class into a tar of finished records and a manifest part."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wn21k_zoo.errors import DataSourceError
from wn21k_zoo.files import atomic_file, visible
from wn21k_zoo.training.encode import BadImageError, store_image
from wn21k_zoo.training.extra import cv2, pa, pq
from wn21k_zoo.training.manifest import DAMAGES, PART_SCHEMA, ClassResult, Decision, shown
from wn21k_zoo.training.options import PrepareOptions, disk_full_as_error
from wn21k_zoo.training.shards import encode_record, sample_hash
from wn21k_zoo.training.sources import LINKED_FOLDER, ClassSource, Member, member_reader, read_members

__all__ = ["decide", "finished_classes", "prepare_class", "read_or_bad"]

_PLAIN_STEM = re.compile(r"[A-Za-z0-9_]{1,90}")  # a tar header has room for 100 characters
_RESULT_KEY = b"wn21k_zoo.result"
_REPLACED = "a later file has the same name"
_NO_IMAGES = (_REPLACED, LINKED_FOLDER)  # reasons of rows that stand for no image


def prepare_class(source: ClassSource, options: PrepareOptions, folder: Path, is_split: bool) -> ClassResult:
    """Turn one source class into a tar of records and a manifest part in ``folder``; runs as a task."""
    threads = cv2.getNumThreads()
    cv2.setNumThreads(1)  # the workers are the parallelism
    try:
        with disk_full_as_error(folder):
            return _prepare_class(source, options, folder, is_split)
    finally:
        cv2.setNumThreads(threads)  # matters if this is the caller's process
        if source.spooled:
            source.path.unlink(missing_ok=True)


def finished_classes(folder: Path) -> list[ClassResult]:
    """Return the results of all classes that are finished in ``folder``; what is damaged is not finished."""
    results = []
    for part in visible(folder, "*.parquet"):
        try:
            with part.open("rb") as file:
                result = ClassResult(**json.loads((pq.read_schema(file).metadata or {})[_RESULT_KEY]))
        except (TypeError, *DAMAGES) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's; the file may be whole
                raise
            continue
        if result.name == part.stem:
            results.append(result)
    return results


def decide(source: ClassSource, images: int, options: PrepareOptions, is_split: bool) -> Decision:
    """Decide whether a class with that many image names is kept, or why not (:attr:`ClassResult.decision`)."""
    if source.wnid not in options.space:
        return "outside the label space"
    return "kept" if is_split or images > options.min_images else "too few images"


def _odd(row: dict[str, Any]) -> Iterator[str]:
    if row["format"] != "JPEG":
        yield f"{row['format']} by its content"
    if row["mode"] not in ("RGB", "L"):
        yield f"colours {row['mode']}"
    if row["orientation"] != 1:
        yield "rotated by EXIF"


def _listed(source: ClassSource) -> tuple[dict[str, Member], list[dict[str, Any]], bool]:
    """Return each file's last occurrence by its name, rows for unused files, and whether all could be read.

    Files of one name in several folders of the class are named by their paths.
    """
    last: dict[str, Member] = {}
    rows: list[dict[str, Any]] = []
    try:
        for member in read_members(source):
            if member.refused is not None:
                rows.append({"name": member.name, "reason": member.refused})
            else:
                if member.inner in last:
                    rows.append({"name": member.name, "reason": _REPLACED})
                last[member.inner] = member
    except DataSourceError:
        return _by_name(last), rows, False
    return _by_name(last), rows, True


def _by_name(members: dict[str, Member]) -> dict[str, Member]:
    counts = Counter(member.name for member in members.values())
    return {member.name if counts[member.name] == 1 else inner: member for inner, member in members.items()}


def _prepare_class(source: ClassSource, options: PrepareOptions, folder: Path, is_split: bool) -> ClassResult:
    last, rows, is_whole = _listed(source)
    decision: Decision = "kept" if is_whole else "damaged archive"
    names = sorted(last, key=lambda name: name.encode("utf-8", "surrogateescape"))
    if decision == "kept":
        decision = decide(source, len(names), options, is_split)
    if decision != "kept":
        rows += [{"name": name, "reason": decision} for name in names]
        return _write_part(source, folder, decision, rows)
    splits = dict.fromkeys(names, source.split or "train")
    if not is_split:
        splits.update(dict.fromkeys(names[: options.val_per_class], "validation"))
    keys = _keys_of(source.wnid, names)
    target = options.space.index[source.wnid]
    with atomic_file(folder / f"{source.name}.tar") as file, member_reader() as read:
        for name, member in last.items():
            try:
                stored = store_image(read_or_bad(read, member), options.size, options.resize, options.quality)
            except BadImageError as error:
                rows.append({"name": name, "key": keys[name], "reason": str(error)})
                continue
            details = {
                "filename": shown(name),
                "synset": source.wnid,
                "label": target,
                "width": stored.stored_width,
                "height": stored.stored_height,
            }
            record = encode_record(keys[name], stored.data, target, details)
            rows.append(
                {
                    **{field: value for field, value in asdict(stored).items() if field != "data"},
                    "name": name,
                    "key": keys[name],
                    "split": splits[name],
                    "stored_bytes": len(stored.data),
                    "sha256": hashlib.sha256(stored.data).hexdigest(),
                    "start": file.tell(),
                    "length": len(record),
                    "order": sample_hash(keys[name]),
                }
            )
            file.write(record)
    return _write_part(source, folder, decision, rows)


def read_or_bad(read: Callable[[Member], bytes], member: Member) -> bytes:
    """Read the bytes of a file; one that cannot be read counts as a bad image."""
    try:
        return read(member)
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from None


def _keys_of(wnid: str, names: list[str]) -> dict[str, str]:
    """Return the shard keys: names without suffix if these are plain and begin with the wnid, as ImageNet's do."""
    keys: dict[str, str] = {}
    taken: set[str] = set()
    for rank, name in enumerate(names):
        stem = name.rpartition(".")[0]
        plain = _PLAIN_STEM.fullmatch(stem) and stem.startswith(f"{wnid}_") and stem not in taken
        keys[name] = stem if plain else f"{wnid}-{rank:06d}"
        taken.add(keys[name])
    return keys


def _write_part(source: ClassSource, folder: Path, decision: Decision, rows: list[dict[str, Any]]) -> ClassResult:
    rows.sort(key=lambda row: (row["name"].encode("utf-8", "surrogateescape"), row.get("reason") or ""))
    counts = Counter(row.get("split") for row in rows)
    reasons = Counter(row["reason"] for row in rows if row.get("reason"))
    no_images = {reason: reasons.pop(reason, 0) for reason in _NO_IMAGES}
    result = ClassResult(
        name=source.name,
        wnid=source.wnid,
        decision=decision,
        images=len(rows) - sum(no_images.values()),
        train=counts["train"],
        validation=counts["validation"],
        stored_bytes=sum(row.get("stored_bytes") or 0 for row in rows),
        source_bytes=source.num_bytes,
        reasons=dict(sorted(reasons.items())),
        linked_folders=no_images[LINKED_FOLDER],
        odd=dict(sorted(Counter(what for row in rows if row.get("split") for what in _odd(row)).items())),
    )
    for row in rows:
        row["synset"], row["name"] = source.wnid, shown(row["name"])
    columns = {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in PART_SCHEMA}
    table = pa.table(columns, schema=PART_SCHEMA.with_metadata({_RESULT_KEY: json.dumps(asdict(result))}))
    with atomic_file(folder / f"{source.name}.parquet") as file:
        pq.write_table(table, file, write_page_checksum=True)
    return result
