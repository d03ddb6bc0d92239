"""The loader: batches of a data set in an order that depends only on the seed and the epoch.

The order of samples does not depend on the number of ranks or workers, nor on interruptions: the state is an epoch and
the number of its samples seen so far, and a resumed loader, even with a different number of ranks, continues with
exactly the unseen ones. The randomness of augmentation is a function of (seed, epoch, sample). Workers deliver whole
batches as bytes; the conversion to numbers in [0, 1] happens on the device.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from wn21k_zoo.errors import BadImagesError, DataError, InvalidArgumentError, check_share, whole_number
from wn21k_zoo.training.augment import PublishedAugmentation, Squash
from wn21k_zoo.training.dataset import ImageDataset, ShardedDataset, open_dataset
from wn21k_zoo.training.extra import cv2
from wn21k_zoo.training.failures import is_of_a_worker, worker_gone
from wn21k_zoo.training.folder import FolderDataset, is_class_folder, open_folder, open_folders
from wn21k_zoo.training.open_shards import AnyDataset, TorchDataset, check_dataset
from wn21k_zoo.training.order import SampleOrder
from wn21k_zoo.training.storage import Stage
from wn21k_zoo.training.tasks import no_processes
from wn21k_zoo.training.workers import (
    Augmentation,
    Reader,
    Task,
    allow_open_files,
    begin_worker,
    check_temporary_folder,
    forks_from_a_server,
    shielded,
    warn_of_main,
)

__all__ = [
    "Augmentation",
    "Batch",
    "FolderDataset",
    "ImageDataset",
    "Loader",
    "LoaderState",
    "PublishedAugmentation",
    "ShardedDataset",
    "Squash",
    "Stage",
    "TorchDataset",
    "is_class_folder",
    "open_dataset",
    "open_folder",
    "open_folders",
]

_LOG = logging.getLogger(__name__)
_NAMED = 20  # damaged samples listed in the log


class LoaderState(TypedDict):
    """Position of a loader; ``samples_seen`` counts all ranks together."""

    epoch: int
    samples_seen: int


@dataclass
class Batch:
    """One rank's part of a batch; ``images, targets = batch`` unpacks what training needs.

    Not frozen, so that Lightning and the like can move it.

    ``images``: [n, 3, size, size] on the device, channels_last, floating point in [0, 1]. ``targets``: class indices,
    [n] int64. ``samples``: numbers of the samples in the data set, [n] int64, on the CPU. ``names``: names of the
    images, if the loader was asked for them. ``n`` is smaller than the batch size if samples were damaged, and in the
    last batch of an evaluation.
    """

    images: torch.Tensor
    targets: torch.Tensor
    samples: torch.Tensor
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter((self.images, self.targets))


class Loader:
    """Batches of a data set for one rank.

    In training, iterating yields the rest of the current epoch, or the next epoch if nothing is left, and ends at the
    start of the following one; all ranks get the same number of full batches, and a remainder of less than a step is
    dropped. In evaluation it yields all samples, or ``limit`` of them, unless :meth:`load_state_dict` was called just
    before, in their own order, each exactly once over all ranks; a rank's last batch may be smaller or missing.

    A damaged sample is logged with shard and key, counted in ``bad_samples`` and dropped; its batch is one smaller, or
    empty, so that no other rank has to wait: the losses of :mod:`wn21k_zoo.training.losses` are then 0.

    Args:
        dataset: From :func:`open_dataset` or :func:`open_folder`.
        batch_size: Batch size per rank.
        training: Whether to shuffle and drop the last partial batch.
        augmentation: Called with the pixels [height, width, 3] uint8 RGB and a ``random.Random``; must be picklable.
            Default: the published one in training, otherwise only resizing.
        seed: Seed of order and augmentation.
        rank: Rank of this process.
        world_size: Number of ranks.
        workers: Number of processes that decode and augment; 0: this one does. For workers, this process's limit of
            open files is raised to 4096 if it is lower and can be raised.
        device: Where the tensors of a batch are; the next batch is transferred while the current one is in use.
        window: Number of shards whose samples are mixed.
        max_bad: Share of an epoch's samples that may be damaged; 1,000 times this number always may (ten for 0.01).
        names: Whether batches include the names of their images.
        limit: In evaluation, read only so many samples over all ranks, spread evenly over all shards,
            which are all fetched if they are remote.
        accumulation: In training, number of batches of each rank per step; a remainder of less than a step is dropped.

    Raises:
        InvalidArgumentError: An argument is invalid or out of range, or training data is smaller than a step of all
            ranks.

    Iterating raises :class:`BadImagesError` if more than ``max_bad`` are damaged, :class:`DataError` if a shard is
    missing.

    Example:
        >>> loader = Loader(open_dataset("shards"), batch_size=64, workers=8, device="cuda")
        >>> for epoch in range(80):
        ...     for images, targets in loader:
        ...         loss = criterion(model(images), targets)
    """

    def __init__(
        self,
        dataset: AnyDataset,
        *,
        batch_size: int,
        training: bool = True,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: str | torch.device = "cpu",
        window: int = 16,
        max_bad: float = 0.01,
        accumulation: int = 1,
        names: bool = False,
        limit: int | None = None,
    ) -> None:
        check_dataset(dataset, "Loader")
        batch_size, window = whole_number("batch_size", batch_size, 1), whole_number("window", window, 1)
        accumulation, workers = whole_number("accumulation", accumulation, 1), whole_number("workers", workers, 0)
        world_size, seed = whole_number("world_size", world_size, 1), whole_number("seed", seed, 0)
        rank = whole_number("rank", rank, 0, world_size - 1)
        check_share("max_bad", max_bad)
        if limit is not None:
            limit = whole_number("limit", limit, 1)
            if training:
                raise InvalidArgumentError("limit is for evaluation; pass training=False.")
        if training and len(dataset) < batch_size * world_size * accumulation:
            raise InvalidArgumentError(
                f"The data set has {len(dataset):,} samples, fewer than one step of all ranks "
                f"({batch_size} x {world_size}{f' x {accumulation}' if accumulation > 1 else ''}); take a "
                "smaller batch."
            )
        self.dataset, self.batch_size, self.training = dataset, batch_size, training
        self.world_size = world_size
        if augmentation is not None:
            _check_augmentation(augmentation)
        try:
            self.device = torch.device(device)
        except (RuntimeError, TypeError):
            raise InvalidArgumentError(f"device is {device!r}; give cpu, cuda, cuda:N or mps.") from None
        self.max_bad = max_bad
        self.bad_samples = self._bad_of_epoch = self._seen_of_epoch = 0
        self._told = False  # whether load_state_dict was called just before
        self._stream: torch.cuda.Stream | None = None
        self._named: set[tuple[str, str]] = set()
        self._order = SampleOrder(dataset.lengths, window if training else 0, seed, limit)
        self.num_samples = len(self._order)
        self._plan = _Plan(self.num_samples, batch_size, training, rank, world_size, accumulation)
        reader = Reader(
            dataset, self._order, augmentation or (PublishedAugmentation() if training else Squash()), names
        )
        self._batches: DataLoader[dict[str, Any]] = DataLoader(
            reader,
            batch_size=None,
            sampler=self._plan,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,  # whole batches, in pinned memory
            worker_init_fn=begin_worker,
            # Processes that a fork server starts would inherit its signal mask, not ours.
            multiprocessing_context="spawn" if workers and forks_from_a_server() else None,
        )

    def __repr__(self) -> str:
        return f"Loader({self.dataset!r}, batches of {self.batch_size}, {self.device}, {self.state_dict()})"

    def __len__(self) -> int:
        """Number of batches of a whole epoch for this rank."""
        return sum(1 for _ in self._plan.tasks(0, 0))

    def __iter__(self) -> Iterator[Batch]:
        if not self.training and not self._told:
            self._plan.samples_seen = 0
        elif self.training and next(iter(self._plan), None) is None:  # a caller that counts batches never exhausts it
            self._begin_next_epoch()
        self._told = False
        self._bad_of_epoch = self._seen_of_epoch = 0
        try:
            for seen, batch in self._on_device(self._loaded()):
                self._plan.samples_seen = seen
                yield batch
        except Exception:  # of loading; one of the caller's does not come here
            self.close()
            raise
        self._begin_next_epoch()

    def _begin_next_epoch(self) -> None:
        self._plan.epoch, self._plan.samples_seen = self._plan.epoch + 1, 0

    def state_dict(self) -> LoaderState:
        """Return the state after the batch yielded last; the same on all ranks."""
        return {"epoch": self._plan.epoch, "samples_seen": self._plan.samples_seen}

    def load_state_dict(self, state: LoaderState) -> None:
        """Continue where another loader of the same data set and seed was, even with a different number of ranks.

        Raises:
            InvalidArgumentError: The state cannot be one of this data set.
        """
        if state["epoch"] < 0 or not 0 <= state["samples_seen"] <= self.num_samples:
            raise InvalidArgumentError(f"{state} is not a state of a loader of {self.num_samples:,} samples.")
        self._plan.epoch, self._plan.samples_seen = state["epoch"], state["samples_seen"]
        self._told = True

    def close(self) -> None:
        """End the processes that load images; the next iteration starts new ones, and one under way raises an error.

        After an error of loading it is called anyway. Otherwise they end with the last reference to the loader, which
        after an error of yours or Ctrl-C in a notebook is the traceback's; the garbage collector may then wait for each
        of them.
        """
        loaded, self._batches._iterator = self._batches._iterator, None
        if loaded is not None:
            loaded._shutdown_workers()  # type: ignore[attr-defined]

    def _there(self) -> contextlib.AbstractContextManager[Any]:
        """Make the loader's GPU the current one within: else the first GPU would be used as well."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _loaded(self) -> Iterator[dict[str, Any]]:
        """Yield what the workers read; pinning memory, here or in a thread, uses the current GPU."""
        if self._batches.num_workers:
            warn_of_main()
            allow_open_files()
            check_temporary_folder()
        loaded = None
        try:
            with shielded(), self._there():
                loaded = iter(self._batches)
            while True:
                if self._batches.num_workers and loaded is not self._batches._iterator:
                    raise DataError("The loader was closed in the middle of an epoch; iterate it anew to go on there.")
                with self._there():
                    raw = next(loaded, None)
                if raw is None:
                    return
                yield raw
        except (ConnectionError, EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_of_a_worker(error):
                raise
            raise worker_gone(error) from error
        except OSError as error:
            if loaded is not None:
                raise
            raise no_processes(error, "none (--workers 0)") from error

    def _on_device(self, loaded: Iterator[dict[str, Any]]) -> Iterator[tuple[int, Batch]]:
        """Convert each batch; on a device with streams, the next one while the previous one is in use."""
        if self.device.type == "cuda" and self._stream is None:
            # Kept for good: memory freed on a stream can only be reused by tensors of that stream.
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream = self._stream
        before: tuple[int, Batch] | None = None
        for raw in loaded:
            if "error" in raw:
                raise raw["error"]
            self._count(raw)
            with self._there(), torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
                images = _to_unit(raw["images"], self.device).permute(0, 3, 1, 2)
                targets = raw["targets"].to(self.device, non_blocking=stream is not None)
            now = raw["seen"], Batch(images, targets, raw["samples"], tuple(raw["names"]))
            if stream is None:
                yield now
                continue
            if before is not None:
                yield before
            torch.cuda.current_stream(self.device).wait_stream(stream)
            images.record_stream(torch.cuda.current_stream(self.device))
            targets.record_stream(torch.cuda.current_stream(self.device))
            before = now
        if before is not None:
            yield before

    def _count(self, raw: dict[str, Any]) -> None:
        for shard, key, reason in raw["bad"]:
            if len(self._named) < _NAMED and (shard, key) not in self._named:
                _LOG.warning("sample left out: %s, %s: %s", shard, key, reason)
                self._named.add((shard, key))
                if len(self._named) == _NAMED:
                    _LOG.warning("further damaged samples are not named")
        self.bad_samples += len(raw["bad"])
        self._bad_of_epoch += len(raw["bad"])
        self._seen_of_epoch += len(raw["bad"]) + len(raw["targets"])
        bad, share = self._bad_of_epoch, self.num_samples / self.world_size
        if bad <= self.max_bad * 1000:
            return
        # A share of the whole epoch, as all damaged samples may be at its start; but stop early if most are damaged.
        if bad > self.max_bad * share or bad > max(0.5, self.max_bad) * self._seen_of_epoch:
            shard, key, reason = raw["bad"][-1]
            raise BadImagesError(
                f"{bad:,} of the first {self._seen_of_epoch:,} samples of an epoch of {share:,.0f} are damaged, but "
                f"only {self.max_bad:.1%} may be (the last: {shard}, {key}: {reason}). "
                + "Raise max_bad (for a run data.max_bad, and it continues); or "
                + (
                    f"remove such files ({len(self._named)} were named above), but then a run has to start over."
                    if isinstance(self.dataset, FolderDataset)
                    else "fetch the shards again that `wn21k data verify` names."
                )
            )


def _check_augmentation(augmentation: Any) -> None:
    if not callable(augmentation):
        raise InvalidArgumentError(f"augmentation is {augmentation!r}; pass a function of pixels and a random.Random.")
    fits = not isinstance(augmentation, torch.nn.Module)  # as many of torchvision's; a module takes any arguments
    with contextlib.suppress(ValueError, NameError):  # not written in Python; annotated with what is not there
        takes = inspect.signature(augmentation)
        try:
            takes.bind(None, None)
        except TypeError:
            fits = False
    if not fits:
        raise InvalidArgumentError(
            f"augmentation is called with pixels and a random.Random, which {type(augmentation).__name__} does not "
            "take; for transforms of timm or torchvision use TorchDataset with torch's DataLoader."
        )


class _Plan(Sampler[Task]):
    """One rank's batches for the rest of the epoch.

    It holds no reference to the loader: in a reference cycle the garbage collector would have to end the worker
    processes, and it closes their queues first and then waits for them.
    """

    def __init__(
        self, count: int, batch_size: int, training: bool, rank: int, world_size: int, accumulation: int
    ) -> None:
        self._count, self._batch_size, self._training = count, batch_size, training
        self._rank, self._world_size, self._accumulation = rank, world_size, accumulation
        self.epoch = self.samples_seen = 0

    def __iter__(self) -> Iterator[Task]:
        return self.tasks(self.epoch, self.samples_seen)

    def tasks(self, epoch: int, begin: int) -> Iterator[Task]:
        """Yield the batches from position ``begin`` on."""
        whole = self._batch_size * self._world_size
        end = self._count
        if self._training:
            end -= (end - begin) % (whole * self._accumulation)
        while begin + whole <= end:
            first = begin + self._rank * self._batch_size
            yield epoch, first, first + self._batch_size, begin + whole
            begin += whole
        left = self._count - begin
        first, end = (begin + left * rank // self._world_size for rank in (self._rank, self._rank + 1))
        if not self._training and first < end:
            yield epoch, first, end, self._count


def _to_unit(images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Convert bytes to numbers in [0, 1] on the device, as torchvision's ToTensor does."""
    if device.type != "cpu" or not len(images):
        # Unpinned memory may already hold something else by the time the device reads it.
        return images.to(device, non_blocking=device.type == "cuda").div(255)
    rows = images.numpy().reshape(-1, *images.shape[2:])
    return torch.from_numpy(cv2.LUT(rows, _UNIT).reshape(images.shape))  # twice as fast as torch's arithmetic


_UNIT = np.arange(256, dtype=np.float32) / np.float32(255)
