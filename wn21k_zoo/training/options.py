"""The options of data preparation, and its progress reports."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

from wn21k_zoo.errors import DiskSpaceError, InvalidArgumentError, MissingExtraError, whole_number
from wn21k_zoo.labels import LABEL_SPACES, LabelSpace
from wn21k_zoo.messages import printable
from wn21k_zoo.training.sources import Source
from wn21k_zoo.training.tasks import Engine, run_tasks

__all__ = ["PrepareOptions", "Progress", "Resize", "Tasks", "disk_full_as_error", "warn_of_unused"]

_LOG = logging.getLogger(__name__)
Resize = Literal["squash", "short-edge", "none"]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """The options that decide the bytes of the output.

    Args:
        label_space: A label space, the name of a shipped one, or a text file of wnids; class indices are positions in
            it. It is stored as a label space.
        min_images: A class must have more image names than this (published: 500). Ignored for a source that is split.
        val_per_class: Names per class, first in byte order, that form the validation split (published: 50).
        size: Size in pixels (published: 224).
        resize: ``squash`` to a square, ``short-edge``, or ``none``; a source that comes resized is not resized again.
        quality: JPEG quality, 1 to 100 (OpenCV's default, and so the published one: 95).
        shard_size: Samples per shard.

    Raises:
        InvalidArgumentError: A number is out of range, or the label space has the name of another one.
        UnknownLabelSpaceError, LabelSpaceError, UnknownSynsetError: As :meth:`LabelSpace.find`.
    """

    label_space: str | os.PathLike[str] | LabelSpace = "fall11"
    min_images: int = 500
    val_per_class: int = 50
    size: int = 224
    resize: Resize = "squash"
    quality: int = 95
    shard_size: int = 10_000

    def __post_init__(self) -> None:
        object.__setattr__(self, "label_space", self.space)
        if self.space.name in LABEL_SPACES and not self.space.is_shipped:
            raise InvalidArgumentError(f"{self.space.name} names other classes; give the label space another name.")
        for name, least, most in (
            ("min_images", 0, 10**9), ("val_per_class", 0, 10**9), ("size", 1, 8192), ("quality", 1, 100),
            ("shard_size", 1, 10**6),
        ):  # fmt: skip
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least, most))
        if self.resize not in get_args(Resize):
            raise InvalidArgumentError(f"resize is {self.resize!r}; it can be {', '.join(get_args(Resize))}.")

    def of(self, source: Source) -> PrepareOptions:
        """Return the options for a source, and warn of those that do not apply because it comes split or resized."""
        fixed = ("min_images", "val_per_class") * source.is_split + ("size", "resize") * source.is_resized
        if given := [name for name in fixed if getattr(self, name) != getattr(PrepareOptions, name)]:
            done = "split and resized" if source.is_resized else "split"
            _LOG.warning("the source comes %s; without effect: %s", done, ", ".join(given))
        return replace(self, resize="none") if source.is_resized else self

    @property
    def space(self) -> LabelSpace:
        """The label space."""
        return LabelSpace.find(self.label_space)

    def recorded(self) -> dict[str, Any]:
        """Return the options as ``_info.json`` has them."""
        space = self.space
        name = space.name if space.is_shipped else f"{space.name} ({space.digest[:12]})"
        return {**vars(self), "label_space": name}


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a stage is: ``done`` of ``total`` bytes, shards or the like; ``images`` so far in this run."""

    stage: Literal["classes", "sort", "shards", "manifest", "verify", "evaluate"]
    done: int
    total: int
    images: int


@dataclass(frozen=True)
class Tasks:
    """How to run tasks: number of workers (None: all cores of this machine or the cluster), engine, progress callback.

    Raises:
        InvalidArgumentError: Fewer than one worker.
        MissingExtraError: Ray is not installed.
    """

    workers: int | None
    engine: Engine
    address: str | None
    progress: Callable[[Progress], None]

    def __post_init__(self) -> None:
        if self.workers is not None:
            whole_number("workers", self.workers, 1)
        if self.engine == "ray" and find_spec("ray") is None:
            raise MissingExtraError("The Ray engine", "ray")

    def run(self, function: Callable[..., Any], tasks: Iterator[tuple[Any, ...]]) -> Iterator[Any]:
        """Yield results in the order in which they become ready."""
        return run_tasks(function, tasks, workers=self.workers, engine=self.engine, address=self.address)


def warn_of_unused(source: Source) -> None:
    """Name what lies in a source beside its classes, where a class may be that has another name than a wnid."""
    if names := list(source.unused):
        more = ", ..." if len(names) > 5 else ""
        _LOG.warning("neither a class nor in one, so left out: %s%s", ", ".join(map(printable, names[:5])), more)


@contextlib.contextmanager
def disk_full_as_error(place: Path) -> Iterator[None]:
    """Turn a full disk within the block into a :class:`DiskSpaceError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskSpaceError(
            f"No space is left on the disk of {place}. Finished work is kept: make room and run the same command again."
        ) from None
