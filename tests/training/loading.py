"""Shared by the tests of the loader."""

from dataclasses import dataclass

import torch

from wn21k_zoo.training.data import Loader, Squash, open_dataset

SIZE = 32


@dataclass(frozen=True)
class Noisy:
    """An augmentation that shows which random numbers it was given."""

    size: int = SIZE

    def __call__(self, image, random):
        noisy = Squash(self.size)(image, random).copy()
        noisy[0, 0] = [int(random.random() * 256) for _ in range(3)]
        return noisy


def loader(shards, split="train", **options):
    defaults = {"batch_size": 8, "augmentation": Noisy(), "window": 3, "training": split == "train"}
    return Loader(open_dataset(shards, split), **{**defaults, **options})


def batches(one):
    return [(batch.samples.tolist(), batch.targets.tolist(), batch.images.clone()) for batch in one]


def same(some, others):
    assert [one[:2] for one in some] == [other[:2] for other in others]
    assert all(torch.equal(one[2], other[2]) for one, other in zip(some, others, strict=True))
