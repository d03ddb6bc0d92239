"""Third-party data sets, read without preparing them again; classes are matched by synset.

- WebDataset tar files (``timm/imagenet-w21-wds``, ``timm/imagenet-22k-wds``): their headers are read once, and an index
  like that of our own shards is kept in the cache;
- Parquet files with an image column (``timm/imagenet-w21-p`` on the Hub): each file's label column is read once; its
  images are copied into one of our tar shards on the stage when they are needed.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.errors import DataError, first_line
from wn21k_zoo.files import parse_json
from wn21k_zoo.synsets import WNID_PATTERN
from wn21k_zoo.training.extra import pa, pq
from wn21k_zoo.training.shards import BLOCK, END_OF_TAR, INDEX_DTYPE, encode_record
from wn21k_zoo.training.tars import Header, members_of

__all__ = ["convert_parquet", "index_parquet", "index_tar", "split_of"]

_WNID = re.compile(rf"{WNID_PATTERN.pattern}(?![0-9])")
_IMAGE_KINDS = ("jpg", "jpeg", "png", "webp")
_SPLITS = {"train": "train", "validation": "validation", "val": "validation", "valid": "validation", "test": "test"}


def split_of(name: str) -> str | None:
    """The split named in a file's name: ``imagenet22k-train-0000.tar``, ``data/validation-00000-of-00013.parquet``."""
    for part in reversed(re.split(r"[/._-]", name.lower())):
        if part in _SPLITS:
            return _SPLITS[part]
    return None


_DETAILS = 1 << 24  # bytes


def index_tar(file: IO[bytes], name: str, classes: Mapping[str, int]) -> NDArray[np.void]:
    """Index the samples of a WebDataset tar whose synset is in ``classes``, dtype :data:`INDEX_DTYPE`.

    The synset is that in the sample's key (``n01440764_10026.jpg``), otherwise the one in its json.

    Raises:
        DataError: The file is not a tar, or a sample names no synset.
    """
    entries: list[tuple[int, int, int]] = []
    image: tarfile.TarInfo | None = None
    key, wnid = "", ""

    def finish() -> None:
        if image is None:
            return
        if not wnid:
            raise DataError(
                f"{name}: neither the key {key!r} nor its json names a synset; such a data set cannot be mapped."
            )
        if wnid in classes:
            refuse_holes(image)
            entries.append((image.offset_data, image.size, classes[wnid]))

    def refuse_holes(member: tarfile.TarInfo) -> None:
        if member.issparse():
            raise DataError(f"{name}: {member.name} was packed with holes (tar --sparse).")

    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=Header) as archive:
            for member in members_of(archive):
                if not member.isreg():
                    continue
                path = PurePosixPath(member.name)
                stem, _, kind = path.name.partition(".")
                if str(path.parent / stem) != key:
                    finish()
                    key, image = str(path.parent / stem), None
                    wnid = _synset(stem, path.parent)
                if kind.lower() in _IMAGE_KINDS:
                    image = member
                elif kind == "json" and not wnid:
                    refuse_holes(member)
                    if member.size > _DETAILS:
                        raise DataError(f"{name}: {member.name} is too large for the details of an image.")
                    extracted: Any = archive.extractfile(member)
                    wnid = _synset_in(parse_json(extracted.read()))
            finish()
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise DataError(f"{name} is not a readable WebDataset tar: {first_line(error)}") from None
    return np.array(entries, INDEX_DTYPE)


def _synset_in(details: Any) -> str:
    fields = ("synset", "wnid", "class_name", "class", "filename", "image_id")
    return _synset(*(details.get(field, "") for field in fields)) if isinstance(details, dict) else ""


def index_parquet(file: IO[bytes], name: str, classes: Mapping[str, int]) -> NDArray[np.void]:
    """Index the rows of a Parquet file whose class is in ``classes``.

    In the index, ``offset`` is the row number, ``size`` 0 and ``target`` the class. Rows without a label have no class.

    Raises:
        DataError: The file has no label column whose values or names are synsets, or has paths instead of images.
    """
    try:
        parquet = pq.ParquetFile(file)
        column, names = _label_column(parquet.schema_arrow, name)
        _check_embedded(parquet, name)
        values = parquet.read(columns=[column])[column]
    except (pa.ArrowException, OSError, ValueError, TypeError, AttributeError) as error:  # its metadata is any JSON
        raise DataError(f"{name} is not a readable Parquet file: {first_line(error)}") from None
    if names is not None:
        table = np.array([*(classes.get(_synset(one), -1) for one in names), -1], np.int32)
        numbers = values.fill_null(-1).to_numpy()
        # In a test split with withheld labels they are -1: no class.
        targets = table[np.where((numbers >= 0) & (numbers < len(names)), numbers, len(names))]
    else:
        targets = np.array([classes.get(_synset(one), -1) for one in values.to_pylist()], np.int32)
    rows = np.flatnonzero(targets >= 0)
    index = np.zeros(len(rows), INDEX_DTYPE)
    index["offset"], index["target"] = rows, targets[rows]
    return index


def _check_embedded(parquet: pq.ParquetFile, name: str) -> None:
    """Check that the images are there, as far as the file's statistics tell."""
    groups = [parquet.metadata.row_group(number) for number in range(parquet.metadata.num_row_groups)]
    chunks = [group.column(number) for group in groups for number in range(group.num_columns)]
    bytes_of = [chunk for chunk in chunks if chunk.path_in_schema.endswith(".bytes")]
    known = all(chunk.statistics is not None and chunk.statistics.has_null_count for chunk in bytes_of)
    if bytes_of and known and all(chunk.statistics.null_count == chunk.num_values for chunk in bytes_of):
        raise DataError(f"{name} holds paths of images and not the images; rewrite it with their bytes in it.")


def _synset(*texts: object) -> str:
    """Return the first WordNet id in these texts, or an empty string."""
    return next((found.group() for text in texts if (found := _WNID.search(str(text)))), "")


def _label_column(schema: pa.Schema, name: str) -> tuple[str, list[str] | None]:
    """The column with the class, and the names of its values if these are numbers (Hugging Face's ClassLabel)."""
    features: dict[str, Any] = {}
    if schema.metadata and b"huggingface" in schema.metadata:
        features = parse_json(schema.metadata[b"huggingface"]).get("info", {}).get("features", {})
    for field in schema:
        names = features.get(field.name, {}).get("names") if isinstance(features.get(field.name), dict) else None
        if pa.types.is_integer(field.type) and names and all(_synset(one) for one in names):
            return field.name, names
    for column in ("synset", "wnid", "label", "class_name", "image_id", "filename"):
        if column in schema.names and _is_text(schema.field(column).type):
            return column, None
    raise DataError(
        f"{name} has no column that names synsets (a ClassLabel whose names are WordNet ids, or a text column such as "
        f"'synset'); its columns are {', '.join(schema.names)}."
    )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # such as the categories of pandas
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def convert_parquet(file: IO[bytes], rows: NDArray[np.void], target: Path) -> NDArray[np.void]:
    """Copy the images of some rows of a Parquet file into a tar shard; holds one row group in memory.

    Args:
        file: The Parquet file.
        rows: As :func:`index_parquet` returns them.
        target: The tar to write.

    Returns:
        The index of the tar.
    """
    parquet = pq.ParquetFile(file)
    column = next(
        (
            field.name
            for field in parquet.schema_arrow
            if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
        ),
        "image",
    )
    wanted = dict(zip(rows["offset"].tolist(), range(len(rows)), strict=True))
    index = rows.copy()
    with target.open("wb") as out:
        for row, data in _images(parquet, column):
            if row in wanted:
                place = wanted[row]
                record = encode_record(f"row-{row:09d}", data, int(rows["target"][place]), {"row": row})
                index[place] = (out.tell() + BLOCK, len(data), rows["target"][place])
                out.write(record)
        out.write(END_OF_TAR)
    return index


def _images(parquet: pq.ParquetFile, column: str) -> Iterator[tuple[int, bytes]]:
    row = 0
    for batch in parquet.iter_batches(batch_size=256, columns=[column]):
        for value in batch.column(0):
            found = value.as_py()
            yield row, (found.get("bytes") or b"") if isinstance(found, dict) else found or b""
            row += 1
