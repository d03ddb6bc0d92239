"""The data of a run: its two splits, their classes, and how images are transformed."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from typing import Any

from wn21k_zoo.errors import DataError, RecipeError
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.crops import CenterCrop, RandomCrop
from wn21k_zoo.training.data import (
    Augmentation,
    FolderDataset,
    ImageDataset,
    Loader,
    PublishedAugmentation,
    Squash,
    is_class_folder,
    open_dataset,
    open_folders,
)
from wn21k_zoo.training.distributed import World, launched
from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.training.tasks import count_cores
from wn21k_zoo.tree import SemanticTree

__all__ = ["Splits", "evaluation_resize", "open_loaders", "open_splits", "training_augmentation"]


@dataclass(frozen=True)
class Splits:
    """The two splits of a data set, and its classes.

    ``tree`` and ``space`` are None if the classes are not synsets.
    """

    train: ImageDataset
    validation: ImageDataset
    space: LabelSpace | None
    tree: SemanticTree | None

    @property
    def class_names(self) -> tuple[str, ...]:
        """A wnid, or a folder's name, for each output."""
        return self.train.class_names

    def describe(self) -> dict[str, Any]:
        """What must be the same when a run is resumed."""
        return {
            "label_space": self.space.name if self.space else None,
            "classes": hashlib.sha256("\n".join(self.class_names).encode()).hexdigest(),
            "class_names": None if self.space and self.space.is_shipped else list(self.class_names),
            "images": {"train": len(self.train), "validation": len(self.validation)},
            "files": {"train": self.train.digest, "validation": self.validation.digest},
            "sketch": self.train.sketch if isinstance(self.train, FolderDataset) else "",
        }


def open_splits(recipe: Recipe, data: str | os.PathLike[str]) -> Splits:
    """Open the data of a run.

    Args:
        recipe: The classes are mapped to its label space.
        data: Shards, or a URL of them, or a folder of class folders, named by wnids if the recipe has a label space.

    Raises:
        DataError, UnknownLabelSpaceError: It cannot be read.
        RecipeError: The recipe's loss needs a hierarchy, and the classes have none; or the name of a folder is not a
            class of its label space.
    """
    wanted = recipe.data.space
    train: ImageDataset
    validation: ImageDataset
    if is_class_folder(data):
        train, validation = open_folders(data)
        if wanted is not None:
            try:
                train, validation = train.mapped_to(wanted), validation.mapped_to(wanted)
            except DataError as error:
                raise RecipeError(f"{error} For classes of your own set data.label_space to null.") from None
        space = wanted or train.label_space
    else:
        train = open_dataset(data, label_space=wanted)
        validation = open_dataset(data, "validation", label_space=wanted)
        space = train.label_space
    if space is None and recipe.loss.kind != "single_label":
        raise RecipeError(
            f"loss.kind {recipe.loss.kind} needs classes that are synsets, and {data} has {train.class_names[0]!r}; "
            "name its folders by wnids, or set loss.kind to single_label."
        )
    return Splits(train, validation, space, SemanticTree.from_label_space(space) if space else None)


def open_loaders(recipe: Recipe, splits: Splits, world: World, workers: int | None = None) -> tuple[Loader, Loader]:
    """The loaders of one rank, for training and for evaluation.

    Args:
        recipe: States sizes and augmentation.
        splits: The images.
        world: Says which rank this is.
        workers: Processes per rank; default: the cores of this machine divided by its ranks, at most 16.

    Raises:
        InvalidArgumentError: There are fewer images than in a step.
    """
    micro, accumulation = recipe.micro_batches(world.size)
    if workers is None:
        workers = min(16, max(1, count_cores() // max(1, launched("LOCAL_WORLD_SIZE", 1))))
    common: dict[str, Any] = {
        "rank": world.rank,
        "world_size": world.size,
        "workers": workers,
        "device": world.device,
        "max_bad": recipe.data.max_bad,
    }
    training = Loader(
        splits.train,
        batch_size=micro,
        augmentation=training_augmentation(recipe),
        seed=recipe.run.seed,
        window=recipe.data.window,
        accumulation=accumulation,
        **common,
    )
    # Without gradients there is room for larger batches; on a CPU they are not faster.
    batch = max(micro, min(256, 2 * recipe.data.batch_per_device)) if world.device.type != "cpu" else micro
    limit = recipe.run.evaluate_batches and recipe.run.evaluate_batches * batch * world.size
    resize = evaluation_resize(recipe)
    return training, Loader(
        splits.validation, batch_size=batch, training=False, augmentation=resize, limit=limit, **common
    )


def training_augmentation(recipe: Recipe) -> Augmentation:
    """A recipe's augmentation of images in training."""
    size = recipe.data.size
    if recipe.data.augmentation == "published":
        return PublishedAugmentation(size)
    if recipe.data.augmentation == "modern":
        return RandomCrop(size, scale=0.08, operations=2, erase=0.25)
    return RandomCrop(size, scale=0.25) if recipe.data.augmentation == "finetune" else evaluation_resize(recipe)


def evaluation_resize(recipe: Recipe, size: int | None = None) -> Augmentation:
    """A recipe's transform of images in evaluation, at its size or another: squash, or centre crop."""
    size, crop = size or recipe.data.size, recipe.data.crop_pct
    return CenterCrop(size, crop) if crop else Squash(size)
