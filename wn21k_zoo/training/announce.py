"""What a run reports about itself when it starts or resumes, including settings that may be unintended."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence

from wn21k_zoo.training.algorithms import about_precision
from wn21k_zoo.training.data import FolderDataset
from wn21k_zoo.training.dataset import images_per_class
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
    """Yield the lines to report.

    Args:
        recipe: The run's recipe.
        splits: Its images.
        world: Its processes.
        learner: What it trains.
        step: Step at which it resumes; 0 for a new run.
        total: Number of steps.
        imaged: Number of classes with images for validation.
        layout: Number of processes, and of images at a time in each, until now.
    """
    is_gpu, micro = world.device.type == "cuda", recipe.micro_batches(world.size)[0]
    yield _described(recipe, splits, world, step, total, imaged)
    yield from _passed_over(splits)
    if not step and (advice := about_precision(recipe.run.precision, world.device)):
        yield advice
    if learner.about_teacher:
        yield learner.about_teacher
    if recipe.model.compile and recipe.model.sync_batchnorm and world.size > 1:
        yield "model.sync_batchnorm breaks the compiled graph at each layer; with it model.compile gains little"
    if recipe.run.deterministic and is_gpu and world.size > 1 and NCCL_ALGORITHMS not in os.environ:
        yield "NCCL may sum differently each time; set NCCL_ALGO=^NVLS,NVLSTree before the process group is created"
    if is_gpu and not step and (few := few_for_statistics(learner.module, recipe, world.size)):
        yield few
    if [*layout] != [world.size, micro]:
        yield (
            f"the run used {layout[0]} processes with {layout[1]} images at a time, and resumes in {world.size} with "
            f"{micro}: results agree up to rounding, but differ with batch normalisation, dropout or mixed images"
        )


def _described(recipe: Recipe, splits: Splits, world: World, step: int, total: int, imaged: int) -> str:
    """Describe in one line what is about to happen."""
    ranks = f"{world.size} x {world.device.type}" if world.size > 1 else world.device.type
    classes = f"{len(splits.class_names):,} classes"
    missing = {"validation": len(splits.class_names) - imaged}
    if splits.train.is_here:  # else all indexes would be fetched first
        missing = {"training": int((images_per_class(splits.train) == 0).sum()), **missing}
    if without := [f"{count:,} without images for {what}" for what, count in missing.items() if count]:
        classes += f" ({', '.join(without)})"
    if left := splits.train.left_out + splits.validation.left_out:
        classes += f", {left:,} images of other classes left out"
    begin = f"resuming at step {step:,} of {total:,}" if step else f"{total:,} steps"
    return (
        f"{recipe.name}: {len(splits.train):,} images for training, {len(splits.validation):,} for validation"
        f"{_validated(splits)}, {classes}; {begin} of {recipe.data.batch_size} images on {ranks}"
    )


def _passed_over(splits: Splits) -> Iterator[str]:
    """Report the files of a user's folder that are not read."""
    if not isinstance(splits.train, FolderDataset) or not isinstance(splits.validation, FolderDataset):
        return
    total = Counter(splits.train.passed_over)
    if is_divided(splits.train.root):  # otherwise both count the whole folder
        total.update(splits.validation.passed_over)
    if total:
        kinds = ", ".join(suffix or "none" for suffix, _ in total.most_common(3))
        yield f"{total.total():,} files are skipped because their names have no image suffix ({kinds})"


def _validated(splits: Splits) -> str:
    """Name the folder on which checkpoints are compared: the user may have meant to keep it unseen until the end."""
    data = splits.validation
    if not isinstance(data, FolderDataset) or not is_divided(data.root):
        return ""
    return f" (in {data.name(0).partition('/')[0]})"
