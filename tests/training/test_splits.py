"""The data of a run, and how its images are augmented."""

import contextlib

import numpy as np
import pytest
import torch
from PIL import Image

from wn21k_zoo.errors import BadImagesError
from wn21k_zoo.training.augment import PublishedAugmentation
from wn21k_zoo.training.crops import CenterCrop, RandomCrop
from wn21k_zoo.training.data import Loader, Squash
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.splits import evaluation_resize, open_loaders, open_splits, training_augmentation

from .runs import make_folder, small_recipe

ALONE = World(0, 1, torch.device("cpu"))


def test_a_run_trains_and_evaluates_on_two_splits(shards):
    splits = open_splits(small_recipe(data={"label_space": "fall11"}), shards)
    assert (len(splits.train), len(splits.validation)) == (67, 8)


@pytest.mark.parametrize(
    ("name", "augmentation"),
    [
        ("published", PublishedAugmentation(32)), ("modern", RandomCrop(32, scale=0.08, operations=2, erase=0.25)),
        ("finetune", RandomCrop(32, scale=0.25)), ("none", CenterCrop(32, 0.9)),
    ],
)  # fmt: skip
def test_images_are_changed_as_the_recipe_says(name, augmentation):
    recipe = small_recipe(data={"augmentation": name, "crop_pct": 0.9})
    assert training_augmentation(recipe) == augmentation
    assert evaluation_resize(recipe) == CenterCrop(32, 0.9)
    recipe.data.crop_pct = None
    assert evaluation_resize(recipe) == Squash(32)


def test_images_of_training_are_augmented_and_those_of_an_evaluation_are_not(tmp_path):
    recipe = small_recipe()
    splits = open_splits(recipe, make_folder(tmp_path / "images"))
    for one, folder, same in zip(
        open_loaders(recipe, splits, ALONE, workers=0), (splits.train, splits.validation), (False, True), strict=True
    ):
        batch = next(iter(one))
        assert len(batch) > 5
        for sample, image in zip(batch.samples.tolist(), batch.images, strict=True):
            with Image.open(folder.root / folder.name(sample)) as stored:
                plain = Squash(32)(np.asarray(stored.convert("RGB")), None)
            assert np.array_equal((image.permute(1, 2, 0) * 255).round().byte().numpy(), plain) == same


def test_the_loader_of_a_run_has_what_its_recipe_says(shards, tmp_path):
    recipe = small_recipe(
        data={"label_space": "fall11", "window": 2, "batch_per_device": 2, "max_bad": 0.25}, run={"seed": 3}
    )
    splits = open_splits(recipe, shards)
    training, validation = open_loaders(recipe, splits, ALONE, workers=0)
    assert validation.max_bad == recipe.data.max_bad
    assert len(training) == 67 // 8 * 4  # four micro-batches of 2 make a step; a partial step is dropped
    orders = {
        window: [batch.samples.tolist() for batch in Loader(
            splits.train, batch_size=2, augmentation=Squash(32), seed=3, window=window, accumulation=4, workers=0
        )]
        for window in (2, 16)
    }  # fmt: skip
    assert orders[2] != orders[16]
    assert [batch.samples.tolist() for batch in training] == orders[2]
    folder = make_folder(tmp_path / "images")
    for path in sorted(folder.rglob("*.jpg"))[::5]:
        path.write_bytes(b"damaged")
    for max_bad, raised in ((1.0, contextlib.nullcontext()), (0.001, pytest.raises(BadImagesError))):
        recipe = small_recipe(data={"max_bad": max_bad})
        for one in open_loaders(recipe, open_splits(recipe, folder), ALONE, workers=0)[:1]:
            with raised:
                list(one)
