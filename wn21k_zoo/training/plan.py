"""Estimate the cost of a recipe before it is run: steps, images, hours, memory."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from wn21k_zoo import building, convert
from wn21k_zoo.errors import ModelError, RecipeError, RunError, UnknownModelError, first_line, whole_number
from wn21k_zoo.training.heads import freeze_backbone
from wn21k_zoo.training.manifest import PUBLISHED_TOTALS
from wn21k_zoo.training.network import checkpoint_gradients, few_for_statistics, wrong_size
from wn21k_zoo.training.presets import ARCHITECTURES
from wn21k_zoo.training.recipe import RANDOM, Recipe, is_drop_rate
from wn21k_zoo.training.state import RunFolder
from wn21k_zoo.training.weights import classes_of, is_place, resolved, teacher_record, warn_if_missing

__all__ = ["IMAGES", "Plan", "plan"]

# Training images; that of ImageNet-1K is from arXiv 1409.0575.
IMAGES: Mapping[str, int] = MappingProxyType(
    {"imagenet1k": 1_281_167, **{name: totals.train for name, totals in PUBLISHED_TOTALS.items()}}
)
_PER_TRAINED = {"adam": 12, "adamw": 12, "lamb": 12, "sgd": 8}  # bytes beside a weight: gradient, moments, all float32


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Figures of a run.

    Attributes:
        steps_per_epoch: Steps per epoch.
        steps: Steps of the run.
        epochs: Epochs of the run; fractional where ``schedule.max_steps`` ends it.
        images_seen: Images over all epochs.
        batch_per_gpu: Images that go through the network at a time.
        accumulation: Number of these batches per step.
        classes: Outputs of the head.
        parameters: Parameters of the network.
        memory_gb: A guess per GPU: weights, gradients, optimizer, averages, teacher, and the activations kept for the
            backward pass; excludes what the allocator and the convolutions take in addition.
        disk_gb: What the run's folder takes: ``run.keep`` checkpoints, the best one, and one that is being written.
        hours: None when the speed is not known.
        images_per_second: Per GPU; if not given, that published for a V100.
        assumed: How hours were estimated.
        remarks: What to consider; empty when there is nothing.
    """

    steps_per_epoch: int
    steps: int
    epochs: float
    images_seen: int
    batch_per_gpu: int
    accumulation: int
    classes: int
    parameters: int
    memory_gb: float
    disk_gb: float
    hours: float | None
    images_per_second: float | None
    assumed: str
    remarks: str


def plan(
    recipe: Recipe,
    *,
    gpus: int = 8,
    images_per_second: float | None = None,
    images: int | None = None,
    classes: int | None = None,
) -> Plan:
    """Return the figures of a recipe on a number of GPUs.

    Args:
        recipe: The recipe.
        gpus: Number of GPUs.
        images_per_second: Training speed of one GPU, teacher included; default: that published for a V100.
        images: Training images; default: the published number for the recipe's label space.
        classes: Number of classes; default: those of the recipe's label space, or 1,000.

    Raises:
        RecipeError: The number of images is not known, or the batch cannot be divided among the GPUs.
        InvalidArgumentError: The number of GPUs is not a positive number.
        UnknownNameError: There is no such start, teacher or label space; a folder that is not here is warned of.
    """
    gpus = whole_number("gpus", gpus, 1)
    recipe.check()
    try:
        recipe = resolved(recipe)
    except (ModelError, UnknownModelError):  # not here
        recipe = resolved(recipe, otherwise={})
    for field, name in (("model.start", recipe.model.start), ("loss.teacher", recipe.loss.teacher)):
        if name is None or name.startswith(RANDOM):
            continue
        if is_place(name):
            warn_if_missing(field, name)
        else:
            classes_of(name)  # is there a model of that name?
    if images_per_second is not None and not 0 < images_per_second < math.inf:
        raise RecipeError(f"{images_per_second} images per second is not a speed; give a number above 0.")
    space = recipe.data.space
    images = IMAGES.get(space.name if space else "") if images is None else images
    if images is None:
        what = space.name if space and space.is_shipped else "your data"
        raise RecipeError(f"The number of images in {what} is not known; give --data or --images.")
    micro, group = recipe.micro_batches(gpus)
    per_epoch, steps = recipe.steps(images)
    seen = steps * recipe.data.batch_size
    speed, assumed = (
        (images_per_second, "as given, per GPU (a run reports the sum)")
        if images_per_second
        else _published_speed(recipe, micro)
    )
    num_classes = classes or (len(space) if space else 1000)
    arguments = tuple(recipe.model.arguments.items())
    model = recipe.model
    module, kept = _size(
        model.architecture,
        num_classes,
        recipe.data.size,
        arguments,
        model.gradient_checkpointing,
        model.freeze_backbone,
    )
    parameters = sum(parameter.numel() for parameter in module.parameters())
    # Where ranks accumulate, DistributedDataParallel keeps the gradients that it reduces beside those of this rank.
    gradients = 2 if gpus > 1 and group > 1 else 1
    memory, without = _memory(recipe, module, micro, kept, num_classes, gradients)
    return Plan(
        steps_per_epoch=per_epoch,
        steps=steps,
        epochs=_rounded(steps / per_epoch) if steps % per_epoch else steps // per_epoch,
        images_seen=seen,
        batch_per_gpu=micro,
        accumulation=group,
        classes=num_classes,
        parameters=parameters,
        memory_gb=_rounded(memory / 1e9),
        disk_gb=_rounded((recipe.run.keep + 2) * _checkpoint_bytes(recipe, module) / 1e9),
        hours=_rounded(seen / speed / gpus / 3600) if speed else None,
        images_per_second=round(speed, 1) if speed else None,
        assumed=assumed + without,
        remarks=few_for_statistics(module, recipe, gpus),
    )


def _memory(
    recipe: Recipe, module: nn.Module, micro: int, kept: float, num_classes: int, gradients: int
) -> tuple[float, str]:
    """Return bytes of weights, gradients, optimizer, teacher and kept activations, and a note on what is left out."""
    halved = recipe.run.precision != "fp32"
    parameters = sum(parameter.numel() for parameter in module.parameters())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    memory: float = parameters * (4 + 4 * bool(recipe.run.ema_decay) + 2 * halved)
    memory += trained * (_PER_TRAINED[recipe.optimizer.name] + 4 * (gradients - 1))
    memory += micro * (kept / (1 + halved) + 6 * 4 * num_classes)
    if recipe.loss.teacher is None:
        return memory, ""
    teacher = _architecture_of(recipe.loss.teacher)
    if teacher is None:
        return memory, "; memory without the teacher, whose network is not known here"
    weights = _size(teacher, num_classes, recipe.data.size)[0].parameters()
    return memory + (4 + 2 * halved) * sum(parameter.numel() for parameter in weights), ""


def _checkpoint_bytes(recipe: Recipe, module: nn.Module) -> int:
    """Return the size of one checkpoint: weights, averages, optimizer."""
    weights: int = sum(each.numel() * each.element_size() for each in module.state_dict().values())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    moments = _PER_TRAINED[recipe.optimizer.name] - 4  # without the gradient
    return weights * (1 + bool(recipe.run.ema_decay)) + trained * moments


def _rounded(number: float) -> float:
    return round(number, 1) if number >= 1 else float(f"{number:.2g}")


def _published_speed(recipe: Recipe, images: int) -> tuple[float | None, str]:
    """Return images per second of one V100, including the teacher's forward pass, and where that is from."""
    known = ARCHITECTURES.get(recipe.model.architecture)
    if known is None:
        return None, "unknown; give images per second"
    if recipe.data.size != 224 or recipe.run.precision == "fp32" or recipe.model.gradient_checkpointing:
        return None, "published for 224 pixels in half precision only; give images per second"
    costless = ("img_size", "global_pool")  # the size is that of the images
    if changed := [name for name in recipe.model.arguments if not is_drop_rate(name) and name not in costless]:
        return None, f"published for a network without model.arguments.{changed[0]}; give images per second"
    if recipe.model.freeze_backbone:
        return None, "published for the training of the whole network only; give images per second"
    seconds, how = 1 / known.train_speed, "published training speed of a V100"
    if known.max_batch is not None:
        how += f" with {known.max_batch * 9 // 10} images at a time (here {images})"
    how += known.speed_note
    if recipe.loss.teacher is None:
        return known.train_speed, how
    architecture = _architecture_of(recipe.loss.teacher)
    if architecture is None or architecture not in ARCHITECTURES:
        return None, "the teacher's speed is unknown; give images per second"
    seconds += 1 / ARCHITECTURES[architecture].infer_speed
    return 1 / seconds, f"{how} and the teacher's published inference speed"


def _architecture_of(name: str) -> str | None:
    """Return the architecture of a record, a folder or a run's checkpoint; None if that is missing or on the Hub.

    Raises:
        UnknownModelError, RecipeError: There is no such record, or it cannot be a teacher.
    """
    name = name.removeprefix(RANDOM)
    if not is_place(name):
        return teacher_record(name).architecture
    try:
        if name.endswith(".pt"):
            return RunFolder(Path(name).parent.parent).recipe().model.architecture
        folder = building.as_folder(name)
        return str(building.read_config(folder)["architecture"]) if folder is not None else None
    except (UnknownModelError, ModelError, RunError):
        return None


@functools.lru_cache(maxsize=32)
def _size(
    architecture: str,
    num_classes: int,
    size: int,
    arguments: tuple[tuple[str, Any], ...] = (),
    gradient_checkpointing: bool = False,
    frozen: bool = False,
) -> tuple[nn.Module, float]:
    """Return network and bytes of float32 activations kept per image; nothing is computed or allocated."""
    convert.check_architecture(architecture, RecipeError)
    with torch.device("meta"):
        try:
            module = convert.build(architecture, num_classes=num_classes, **dict(arguments)).train()
        except Exception as error:  # timm has many ways to refuse an argument
            raise RecipeError(f"{architecture} cannot be built: {first_line(error)}") from error
        if frozen:
            freeze_backbone(module)
        kept = _kept(module, architecture, size)
        if gradient_checkpointing:
            checkpoint_gradients(module, architecture)
            # What a block keeps while it is recomputed is a further guess.
            kept = _kept(module, architecture, size) + kept / 8
    return module, kept


def _kept(module: nn.Module, architecture: str, size: int) -> float:
    storages: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held.append(storage)  # else another one may get its address
        storages[storage._cdata] = storage.nbytes()
        return tensor

    held: list[torch.UntypedStorage] = []
    images = 2  # some batch statistics need more than one
    try:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            module(torch.empty(images, 3, size, size))
    except (RuntimeError, AssertionError) as error:
        raise wrong_size(architecture, size, error) from None
    for weights in (*module.parameters(), *module.buffers()):
        storages.pop(weights.untyped_storage()._cdata, None)
    return sum(storages.values()) / images
