"""What a run says of itself when it begins or goes on, and what of it may not be meant."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from wn21k_zoo.training.algorithms import about_precision
from wn21k_zoo.training.data import FolderDataset
from wn21k_zoo.training.distributed import NCCL_ALGORITHMS, World
from wn21k_zoo.training.folder import is_divided
from wn21k_zoo.training.learner import Learner
from wn21k_zoo.training.network import few_for_statistics
from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.training.splits import Splits

__all__ = ["announcements"]


def announcements(
    recipe: Recipe,
    splits: Splits,
    world: World,
    learner: Learner,
    step: int,
    total: int,
    imaged: int,
    layout: Sequence[int],
) -> Iterator[str]:
    """The lines of it.

    Args:
        recipe: Of the run.
        splits: Its images.
        world: Its processes.
        learner: What it trains.
        step: From which it goes on, 0 where it begins.
        total: So many there are.
        imaged: So many classes have images for validation.
        layout: Processes, and images at a time of each, until now.
    """
    is_gpu, micro = world.device.type == "cuda", recipe.micro_batches(world.size)[0]
    yield _described(recipe, splits, world, step, total, imaged)
    yield from _passed_over(splits)
    if not step and (advice := about_precision(recipe.run.precision, world.device)):
        yield advice
    if learner.about_teacher:
        yield learner.about_teacher
    if recipe.model.compile and recipe.model.sync_batchnorm and world.size > 1:
        yield "model.sync_batchnorm interrupts what is compiled at each layer; model.compile gains little beside it"
    if recipe.run.deterministic and is_gpu and world.size > 1 and NCCL_ALGORITHMS not in os.environ:
        yield "NCCL may add up otherwise each time; set NCCL_ALGO=^NVLS,NVLSTree before the process group is made"
    if is_gpu and not step and (few := few_for_statistics(learner.module, recipe, world.size)):
        yield few
    if [*layout] != [world.size, micro]:
        yield (
            f"it went in {layout[0]} processes with {layout[1]} images at a time, and goes on in {world.size} with "
            f"{micro}: results are the same to rounding, but with batch normalisation, dropout or mixed images others"
        )


def _described(recipe: Recipe, splits: Splits, world: World, step: int, total: int, imaged: int) -> str:
    """What is about to happen, in one line."""
    ranks = f"{world.size} x {world.device.type}" if world.size > 1 else world.device.type
    classes = f"{len(splits.class_names):,} classes"
    if missing := len(splits.class_names) - imaged:
        classes += f" ({missing:,} without images for validation)"
    if left := splits.train.left_out + splits.validation.left_out:
        classes += f", {left:,} images of others left out"
    begin = f"going on at step {step:,} of {total:,}" if step else f"{total:,} steps"
    return (
        f"{recipe.name}: {len(splits.train):,} images for training, {len(splits.validation):,} for validation"
        f"{_validated(splits)}, {classes}; {begin} of {recipe.data.batch_size} images on {ranks}"
    )


def _passed_over(splits: Splits) -> Iterator[str]:
    """Files of a user's folder that nobody reads."""
    if not isinstance(splits.train, FolderDataset) or not isinstance(splits.validation, FolderDataset):
        return
    total = Counter(splits.train.passed_over)
    if is_divided(splits.train.root):  # else both count all of it
        total.update(splits.validation.passed_over)
    if total:
        kinds = ", ".join(suffix or "none" for suffix, _ in total.most_common(3))
        yield f"{total.total():,} files are passed over, whose names do not end as those of images do ({kinds})"


def _validated(splits: Splits) -> str:
    """On which of a user's folders checkpoints are compared, which nobody may have meant to be seen before."""
    data = splits.validation
    if not isinstance(data, FolderDataset) or not is_divided(data.root):
        return ""
    return f" (in {data.name(0).partition('/')[0]})"
