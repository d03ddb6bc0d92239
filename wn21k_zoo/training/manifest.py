"""The manifest, with a row for every image of the source, and its totals."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.markdown import markdown_table
from wn21k_zoo.messages import printable
from wn21k_zoo.training.extra import pa, pq

__all__ = [
    "DAMAGES",
    "MANIFEST_SCHEMA",
    "PART_SCHEMA",
    "PUBLISHED_TOTALS",
    "ClassResult",
    "Decision",
    "classes_csv",
    "read_table",
    "shown",
    "summary",
]

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("synset", pa.string(), nullable=False),
        pa.field("name", pa.string(), nullable=False),  # of the file in the source
        pa.field("split", pa.string()),  # train, validation; null: not used
        pa.field("reason", pa.string()),  # why it is not used
        pa.field("shard", pa.string()),
        pa.field("key", pa.string()),  # in the shard
        pa.field("width", pa.int32()),  # original, upright
        pa.field("height", pa.int32()),
        pa.field("stored_width", pa.int32()),
        pa.field("stored_height", pa.int32()),
        pa.field("stored_bytes", pa.int32()),
        pa.field("sha256", pa.string()),  # of the stored bytes
        pa.field("action", pa.string()),  # resized, copied, re-encoded
        pa.field("format", pa.string()),  # of the original, by its content
        pa.field("mode", pa.string()),  # of the original: RGB, L, CMYK, ...
        pa.field("orientation", pa.int8()),  # EXIF, 1 is upright
    ]
)
# A class's own part also has the place of each record in the class's tar, and the number that records are sorted by.
PART_SCHEMA = pa.schema(
    [
        *(field for field in MANIFEST_SCHEMA if field.name != "shard"),
        pa.field("start", pa.uint64()),
        pa.field("length", pa.uint32()),
        pa.field("order", pa.uint64()),
    ]
)


# What Arrow raises for a damaged file; an OSError has no number then.
DAMAGES = (OSError, ValueError, KeyError, pa.lib.ArrowNotImplementedError)
Decision = Literal["kept", "outside the label space", "too few images", "damaged archive"]


@dataclass(frozen=True)
class PublishedTotals:
    """Images and classes as published."""

    classes: int
    train: int
    validation: int


PUBLISHED_TOTALS: Mapping[str, PublishedTotals] = MappingProxyType(
    {
        "imagenet21k_p_fall11": PublishedTotals(11_221, 11_797_632, 561_052),
        "imagenet21k_p_winter21": PublishedTotals(10_450, 11_060_223, 522_500),
    }
)


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """What became of one class of the source (or of one of its splits, where the source is split).

    ``images`` counts file names; ``reasons`` counts those not used, by reason; ``odd`` counts used ones that are not
    plain upright JPEGs, by kind. ``linked_folders`` counts links to folders, which are not followed.
    """

    name: str
    wnid: str
    decision: Decision
    images: int
    train: int = 0
    validation: int = 0
    stored_bytes: int = 0
    source_bytes: int = 0
    reasons: Mapping[str, int]
    odd: Mapping[str, int]
    linked_folders: int = 0

    @property
    def used(self) -> int:
        """Number of images in the output."""
        return self.train + self.validation

    @property
    def is_wanted(self) -> bool:
        """Whether its images should be used, even if some are damaged."""
        return self.decision in ("kept", "damaged archive")

    @property
    def bad(self) -> int:
        """Number of images that should be used but cannot be."""
        return sum(self.reasons.values()) if self.is_wanted else 0


def read_table(path: Path, columns: Sequence[str] | None = None, **options: Any) -> pa.Table:
    """Read a Parquet file of ours; by path, Arrow would take ``s3:x`` for a URL and refuse names that are not UTF-8.

    Not by pyarrow's function of that name, which takes longer for a small file; there are thousands.
    """
    with path.open("rb") as file, pq.ParquetFile(file, **options) as parquet:
        return parquet.read(columns=columns)


def shown(name: str) -> str:
    """Return a name as text, even if it is not valid UTF-8."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def classes_csv(results: Iterable[ClassResult]) -> str:
    """Return a CSV with one line per class; the two splits of a source that is already split are added up."""
    lines: dict[str, list[Any]] = {}
    for one in results:
        line = lines.setdefault(one.wnid, [one.wnid, one.decision, 0, 0, 0, 0])
        for place, count in enumerate((one.images, one.train, one.validation, one.bad), start=2):
            line[place] += count
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("synset", "decision", "images", "train", "validation", "bad"))
    writer.writerows(lines.values())
    return text.getvalue()


def summary(
    results: Sequence[ClassResult], space: LabelSpace, options: Mapping[str, Any], unused: Sequence[str] = ()
) -> str:
    """Return a summary in Markdown: options, totals beside the published ones, what was left out and why.

    ``unused`` names what lies in the source beside its classes.
    """
    kept = [one for one in results if one.used]
    train, validation = sum(one.train for one in kept), sum(one.validation for one in kept)
    classes = len({one.wnid for one in kept})
    lines = ["# Prepared data set", "", f"Label space {space.name}, {len(space):,} classes.", ""]
    lines += [markdown_table(("option", "value"), options.items()), ""]
    ours = (("classes", classes), ("train images", train), ("validation images", validation))
    published = PUBLISHED_TOTALS.get(space.name) if space.is_shipped else None
    if published is None:
        lines += [markdown_table(("", "here"), ((name, f"{count:,}") for name, count in ours)), ""]
    else:
        theirs = (published.classes, published.train, published.validation)
        rows = (
            (name, f"{count:,}", f"{other:,}", f"{count - other:+,}")
            for (name, count), other in zip(ours, theirs, strict=True)
        )
        lines += [markdown_table(("", "here", "published", "difference"), rows)]
        lines += ["", "Published: dataset_preprocessing/processing_instructions.md of Alibaba-MIIL/ImageNet21K."]
        if space.name == "imagenet21k_p_fall11":
            lines += ["Its validation count is two more than 50 for each of its classes; why is not known."]
        lines += [""]
    lines += ["## Left out", ""]
    decisions = Counter(decision for _, decision in {(one.wnid, one.decision) for one in results})
    decisions.pop("kept", None)
    images = Counter[str]()
    for one in results:
        images[one.decision] += one.images
    lines += [f"- {what}: {count:,} classes, {images[what]:,} images" for what, count in sorted(decisions.items())]
    reasons = Counter[str]()
    for one in results:
        if one.is_wanted:
            reasons.update(one.reasons)
    lines += [f"- {what}: {count:,} images" for what, count in sorted(reasons.items())]
    missing = len(space) - classes
    lines += [f"- of the label space's classes, {missing:,} have no images here"] if missing else []
    trained = {one.wnid for one in kept if one.train}
    if untrained := classes - len(trained):
        lines += [f"- classes with validation images alone: {untrained:,}"]
    if linked := sum(one.linked_folders for one in results):
        lines += [f"- links to folders within classes, which are not followed: {linked:,}"]
    if unused:
        more = ", ..." if len(unused) > 20 else ""
        lines += [f"- neither a class nor in one: {', '.join(printable(shown(name)) for name in unused[:20])}{more}"]
    lines += ["nothing"] if lines[-1] == "" else []
    odd = Counter[str]()
    for one in results:
        odd.update(one.odd)
    if odd:
        lines += ["", "## Odd, and used all the same", ""]
        lines += [f"- {what}: {count:,} images" for what, count in sorted(odd.items())]
    lines += ["", "Every image has its row in manifest.parquet, every class its line in classes.csv.", ""]
    return "\n".join(lines)
