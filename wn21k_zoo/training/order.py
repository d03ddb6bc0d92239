"""The order of samples: a function of seed and epoch, whatever the number of ranks, workers and restarts.

Shards are shuffled, then the samples within a window of shards. So a machine needs only the shards of one window at a
time (while the next ones are fetched), which suits network file systems and object storage; the shards themselves are
already mixed. Random numbers are the raw output of NumPy's Philox generator, which NumPy promises not to change
(NEP 19), sorted stably.
"""

from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SampleOrder", "permutation"]


def permutation(count: int, *key: int) -> NDArray[np.int64]:
    """Return a permutation of ``range(count)`` that depends only on the integers of ``key``, shape [count]."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    numbers = np.random.Philox(key=int.from_bytes(digest, "little")).random_raw(count)
    return np.argsort(numbers, kind="stable")


@dataclass(frozen=True)
class SampleOrder:
    """The order of the samples of shards of given lengths.

    Args:
        lengths: Samples of each shard.
        window: Number of shards that are mixed with each other; 0: no shuffling at all.
        seed: The same seed gives the same order.
        limit: Only so many samples, spread evenly over those of all shards, where nothing is shuffled; None: all.
    """

    lengths: tuple[int, ...]
    window: int
    seed: int
    limit: int | None = None

    def __len__(self) -> int:
        return min(sum(self.lengths), sys.maxsize if self.limit is None else self.limit)

    @functools.cached_property
    def starts(self) -> NDArray[np.int64]:
        """Index of each shard's first sample among the samples of all shards."""
        return np.cumsum([0, *self.lengths[:-1]], dtype=np.int64)

    @property
    def num_windows(self) -> int:
        """Number of windows of an epoch."""
        return -(-len(self.lengths) // (self.window or 1))

    def windows(self, epoch: int) -> Sequence[NDArray[np.int64]]:
        """The shards of each window of an epoch."""
        return _windows(self, epoch)

    def samples(self, epoch: int, begin: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Return the samples at the positions ``begin`` to ``end`` of an epoch.

        Returns:
            Shard and index within it, shape [end - begin] each, and the window that contains the last sample.
        """
        if self.limit is not None:
            return self._places(np.arange(begin, end) * sum(self.lengths) // len(self))
        bounds = _window_bounds(self, epoch)
        pieces = []
        window = int(np.searchsorted(bounds, begin, side="right")) - 1
        while True:
            first, last = int(bounds[window]), int(bounds[window + 1])
            pieces.append(_window_samples(self, epoch, window)[max(begin, first) - first : min(end, last) - first])
            if end <= last:
                break
            window += 1
        shard, number, _ = self._places(np.concatenate(pieces))
        return shard, number, window

    def _places(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """Shard and index within it of samples, and the last shard."""
        shard = np.searchsorted(self.starts, samples, side="right") - 1
        return shard, samples - self.starts[shard], int(shard[-1])


@functools.lru_cache(maxsize=8)
def _windows(order: SampleOrder, epoch: int) -> tuple[NDArray[np.int64], ...]:
    count, width = len(order.lengths), order.window or 1
    shards = permutation(count, order.seed, epoch) if order.window else np.arange(count)
    return tuple(shards[first : first + width] for first in range(0, count, width))


@functools.lru_cache(maxsize=8)
def _window_bounds(order: SampleOrder, epoch: int) -> NDArray[np.int64]:
    lengths = np.asarray(order.lengths, np.int64)
    return np.cumsum([0, *(int(lengths[window].sum()) for window in order.windows(epoch))])


@functools.lru_cache(maxsize=4)
def _window_samples(order: SampleOrder, epoch: int, window: int) -> NDArray[np.int64]:
    """Return the samples of a window, as indices over all shards, in their order."""
    shards: Sequence[int] = order.windows(epoch)[window].tolist()
    samples = np.concatenate([order.starts[shard] + np.arange(order.lengths[shard]) for shard in shards])
    if not order.window:
        return samples
    return samples[permutation(len(samples), order.seed, epoch, window)]
