"""The worker processes of a loader: from a range of positions to a batch of bytes; they ignore most signals."""

from __future__ import annotations

import contextlib
import functools
import logging
import multiprocessing
import multiprocessing.util
import os
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, get_worker_info

from wn21k_zoo.errors import DataError, ImageError, Wn21kError
from wn21k_zoo.training.dataset import ImageDataset
from wn21k_zoo.training.decode import decode
from wn21k_zoo.training.encode import BadImageError
from wn21k_zoo.training.extra import cv2
from wn21k_zoo.training.open_shards import OpenShards
from wn21k_zoo.training.order import SampleOrder

__all__ = [
    "Augmentation",
    "Reader",
    "Task",
    "allow_open_files",
    "begin_worker",
    "check_temporary_folder",
    "forks_from_a_server",
    "randomness",
    "shielded",
    "warn_of_main",
]

Augmentation = Callable[[NDArray[np.uint8], random.Random], NDArray[np.uint8]]
_LOG = logging.getLogger(__name__)
_OPEN_FILES = 4096
Task = tuple[int, int, int, int]  # epoch, first position, end, samples seen after the whole batch


def begin_worker(worker: int) -> None:
    """Set up a worker process; the first thing that it does."""
    del worker
    if _SHIELD:
        threading.Thread(target=_end_when_the_parent_says_so, daemon=True).start()
    else:
        for name in ("SIGINT", "SIGHUP", "SIGBREAK"):
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
    cv2.setNumThreads(0)  # the workers run in parallel already, and OpenCV's threads do not survive a fork
    torch.set_num_threads(1)


# Ctrl-C, the end of a terminal and many a scheduler's SIGTERM reach all processes at once. A rank that still needs
# batches for its last step must find its workers alive; only a SIGTERM from it ends them.
_LINUX = hasattr(signal, "sigwaitinfo")
_SOCKET_NAME = 107  # bytes, of a socket in the file system of Linux
_SHIELD = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} if _LINUX else set()


def forks_from_a_server() -> bool:
    """Whether processes begin as copies of a server, which may have been started without blocking any signal."""
    return multiprocessing.get_start_method() == "forkserver"


@functools.cache
def warn_of_main() -> None:
    """Warn once that workers import the program that starts them, if nothing in it seems to keep it from running again.

    The workers then end; before Python 3.13 the program may wait for them forever on macOS.
    """
    main = sys.modules["__main__"]
    file = getattr(main, "__file__", None)
    if multiprocessing.get_start_method() == "fork" or getattr(main, "__spec__", None) is not None or not file:
        return
    if Path(file).is_file() and b"__main__" not in Path(file).read_bytes():
        _LOG.warning(
            "processes that load images import %s; if they end, or nothing happens, put what it runs under `if "
            '__name__ == "__main__":`',
            file,
        )


def allow_open_files() -> None:
    """Raise this process's limit of open files: macOS allows 256 at first, and each worker needs about 15."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def check_temporary_folder() -> None:
    """Check that batches can be passed through sockets in the folder for temporary files.

    Raises:
        DataError: Its path is too long for that; the workers would say so, and nothing would ever arrive.
    """
    if torch.multiprocessing.get_sharing_strategy() != "file_descriptor":  # type: ignore[no-untyped-call]
        return
    with contextlib.suppress(OSError):  # said where the processes are started
        folder = multiprocessing.util.get_temp_dir()
        if len(os.fsencode(folder)) + len("/listener-12345678") > _SOCKET_NAME:
            raise DataError(
                f"The path of the folder for temporary files is too long for sockets ({Path(folder).parent}): set "
                "TMPDIR to a shorter one, such as /tmp, or use no workers (--workers 0)."
            )


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Within, new processes and threads start with these signals blocked."""
    if not _SHIELD:
        yield
        return
    if multiprocessing.get_start_method() != "fork":
        resource_tracker.ensure_running()  # before the mask is set, as its start would lift it
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SHIELD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_when_the_parent_says_so() -> None:
    parent = multiprocessing.parent_process()
    while True:
        told = signal.sigwaitinfo(_SHIELD)
        if parent is None or (told.si_signo == signal.SIGTERM and told.si_pid == parent.pid):
            os._exit(0)


class Reader(Dataset[dict[str, Any]]):
    """From a range of positions to a batch of bytes.

    Args:
        dataset: The images.
        order: Which sample is at which position.
        augmentation: Called with the pixels of each image.
        names: Whether a batch includes the names of its images.
    """

    def __init__(self, dataset: ImageDataset, order: SampleOrder, augmentation: Augmentation, names: bool) -> None:
        self.dataset, self.order, self.augmentation, self.names = dataset, order, augmentation, names
        self._shards = OpenShards(dataset, 2 * (order.window or 2))
        self._ahead: threading.Thread | None = None
        self._staged: tuple[int, int] | None = None
        self._shape: tuple[int, ...] | None = None  # of an augmented image

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ahead": None, "_staged": None}

    def __getitem__(self, task: Task) -> dict[str, Any]:
        try:
            return self._read(*task)
        except Wn21kError as error:  # DataLoader would put a traceback into its message
            return {"error": error}

    def _read(self, epoch: int, begin: int, end: int, seen: int) -> dict[str, Any]:
        shards, numbers, window = self.order.samples(epoch, begin, end)
        self._stage_ahead(epoch, window + 1)
        images: torch.Tensor | None = None
        pixels = np.empty(0)
        targets: list[int] = []
        samples: list[int] = []
        names: list[str] = []
        bad: list[tuple[str, str, str]] = []
        for shard, number in zip(shards.tolist(), numbers.tolist(), strict=True):
            entry = self._shards[shard][1][number]
            sample = int(self.order.starts[shard]) + number
            try:
                augmented = self.augmentation(
                    decode(self._shards.read(shard, entry)),
                    randomness(self.order.seed, epoch, sample),
                )
            except (BadImageError, ImageError, OSError, cv2.error) as error:
                bad.append((self.dataset.shard_name(shard), self._shards.key(shard, entry), str(error)))
                continue
            if images is None:
                images = _empty((end - begin, *augmented.shape))
                pixels = images.numpy()
            pixels[len(targets)], self._shape = augmented, augmented.shape
            targets.append(int(entry["target"]))
            samples.append(sample)
            if self.names:
                names.append(self.dataset.place(shard, self._shards.key(shard, entry)))
        if images is None:
            images = torch.empty((0, *self._usual_shape()), dtype=torch.uint8)
        return {
            "images": images[: len(targets)],
            "targets": torch.tensor(targets, dtype=torch.int64),
            "samples": torch.tensor(samples, dtype=torch.int64),
            "names": names,
            "bad": bad,
            "seen": seen,
        }

    def _usual_shape(self) -> tuple[int, ...]:
        """Return the shape of an augmented image, for batches whose images are all damaged."""
        if self._shape is None:
            with contextlib.suppress(Exception):  # of an augmentation that does not take every image
                blank = np.zeros((256, 256, 3), np.uint8)
                self._shape = self.augmentation(blank, randomness(self.order.seed, 0, 0)).shape
        return self._shape or (1, 1, 3)

    def _stage_ahead(self, epoch: int, window: int) -> None:
        """Copy the next window's shards to this machine while this one is read; each worker starts at another shard."""
        if self.dataset.is_here:
            return
        if window == self.order.num_windows:
            epoch, window = epoch + 1, 0
        if self._staged == (epoch, window) or (self._ahead is not None and self._ahead.is_alive()):
            return
        self._staged, dataset = (epoch, window), self.dataset
        worker = get_worker_info()
        shards = np.roll(self.order.windows(epoch)[window], -(worker.id if worker is not None else 0)).tolist()

        def run() -> None:
            for shard in shards:
                with contextlib.suppress(DataError, FileNotFoundError):  # raised again when the shard is needed
                    dataset.open(shard)[0].close()

        self._ahead = threading.Thread(target=run, daemon=True)
        self._ahead.start()


def randomness(seed: int, epoch: int, sample: int) -> random.Random:
    """A generator for one sample; Python's seeds with all bits of the number."""
    return random.Random((seed << 96) ^ (epoch << 64) ^ sample)  # noqa: S311


def _empty(shape: tuple[int, ...]) -> torch.Tensor:
    """An empty tensor of bytes; in a worker in memory shared with the main process, which saves a copy.

    Elsewhere NumPy allocates it, as that asks the system for large pages; touching small ones for the first time takes
    longer than writing to them.
    """
    if get_worker_info() is None:
        return torch.from_numpy(np.empty(shape, np.uint8))
    count = int(np.prod(shape))
    storage = torch.UntypedStorage._new_shared(count)  # type: ignore[no-untyped-call]
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)  # type: ignore[call-overload,no-any-return]
