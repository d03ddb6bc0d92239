"""The model to evaluate, wherever it comes from: its network, classes and head, and how images are prepared."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, cast

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from wn21k_zoo import building
from wn21k_zoo.checkpoints import Head
from wn21k_zoo.errors import InvalidArgumentError, UnknownModelError, first_line, whole_number
from wn21k_zoo.files import expanded, is_run
from wn21k_zoo.images import check_resized
from wn21k_zoo.labels import ClassNames, LabelSpace
from wn21k_zoo.models import LabelSpaceLike, ModelLike, build_transform, load_model, short_side
from wn21k_zoo.running import evaluating
from wn21k_zoo.training.augment import Image
from wn21k_zoo.training.data import Augmentation
from wn21k_zoo.training.export import TRAINED_ON, load_run
from wn21k_zoo.training.failures import is_of_the_device
from wn21k_zoo.training.network import Normalized
from wn21k_zoo.training.splits import evaluation_resize

__all__ = ["Subject", "open_subject", "take_size"]


@dataclass(frozen=True)
class Subject:
    """The model to evaluate.

    Attributes:
        name: The name to report.
        module: Takes pixels in [0, 1].
        classes: Of its outputs.
        head: How the outputs are read.
        resize: Preprocessing of images.
        input_size: Channels, height and width after it.
        trained_on: Sketch of the folder that it was trained on, empty if unknown.
        step: Step of a run's checkpoint.
    """

    name: str
    module: Normalized
    classes: LabelSpace | ClassNames
    head: Head
    resize: Augmentation
    input_size: list[int]
    trained_on: str
    step: int | None = None

    @property
    def space(self) -> LabelSpace | None:
        """Its classes if they are synsets, else None."""
        return self.classes if isinstance(self.classes, LabelSpace) else None

    @property
    def class_names(self) -> tuple[str, ...]:
        """A wnid, or a name of its own, for each output."""
        return tuple(self.classes)


def open_subject(
    model: ModelLike,
    which: str,
    label_space: LabelSpaceLike | None,
    head: Head | None,
    cache_dir: str | os.PathLike[str] | None,
    image_size: int | None,
) -> Subject:
    """Open the model of :func:`wn21k_zoo.training.evaluate.evaluate`, with its arguments and exceptions."""
    size = None if image_size is None else whole_number("image_size", image_size, 1)
    if isinstance(model, (str, os.PathLike)) and is_run(expanded(model, UnknownModelError)):
        if label_space is not None or head is not None:
            raise InvalidArgumentError(
                f"{model} is a run, which states its classes and head; leave out label_space and head."
            )
        trained = load_run(model, which)
        recipe = trained.recipe
        pixels = size or recipe.data.size
        return Subject(
            name=recipe.name,
            module=Normalized(trained.module, recipe.model.mean, recipe.model.std),
            classes=trained.space or ClassNames(trained.class_names),
            head=recipe.loss.head,
            resize=evaluation_resize(recipe, pixels),
            input_size=[3, pixels, pixels],
            trained_on=trained.trained_on,
            step=trained.step,
        )
    if which != "best":
        shown = model if isinstance(model, (str, os.PathLike)) else f"A {type(model).__name__}"
        raise InvalidArgumentError(f"{shown} is not a run and has no {which} checkpoint; omit which (--checkpoint).")
    loaded = load_model(model, label_space=label_space, head=head, cache_dir=cache_dir)
    if loaded.data_config is None:
        raise InvalidArgumentError(
            f"The preprocessing of {loaded.name} is not known; pass a timm network, or the one that this wraps "
            "(module.module): its pretrained_cfg states it."
        )
    config, classes = dict(loaded.data_config), loaded.label_space
    if size is not None:
        config["input_size"] = (3, size, size)
    folder = building.configured_folder(model, cache_dir) if isinstance(model, (str, os.PathLike)) else None
    if len(set(classes)) < len(classes):
        again = next(name for name, count in Counter(classes).items() if count > 1)
        raise InvalidArgumentError(
            f"{loaded.name} has several classes {again!r}, and images of a class are found by its name; rename them."
        )
    return Subject(
        name=loaded.name,
        module=Normalized(loaded.module, config["mean"], config["std"]),
        classes=classes,
        head=loaded.head,
        resize=_OwnResize(build_transform(config, use_prefetcher=True), short_side(config)),  # bytes, not normalised
        input_size=[*config["input_size"]],
        trained_on=str(building.read_config(folder).get(TRAINED_ON) or "") if folder is not None else "",
    )


@dataclass(frozen=True)
class _OwnResize:
    """The preprocessing that a model's configuration states, up to bytes, before normalisation."""

    transform: Callable[[PILImage.Image], Any]
    short_side: float | None

    def __call__(self, image: Image, random: Random) -> Image:
        del random
        if self.short_side is not None:
            check_resized((image.shape[1], image.shape[0]), self.short_side, "The image")
        pixels = np.asarray(self.transform(PILImage.fromarray(image)), np.uint8)
        return np.ascontiguousarray(pixels.transpose(1, 2, 0))


def take_size(subject: Subject, size: int, run: Callable[[Tensor], Any], device: torch.device, resample: bool) -> None:
    """Check that a network takes images of a size.

    Args:
        subject: Has the network.
        size: Width and height in pixels.
        run: From images to logits, as in the evaluation.
        device: The network's device.
        resample: Whether its position embeddings may be resampled to that size, if it can do that.

    Raises:
        InvalidArgumentError: It does not.
    """
    network = subject.module.module
    try:
        if resample and callable(getattr(network, "set_input_size", None)):
            cast(Any, network).set_input_size(img_size=size)
        with torch.inference_mode(), evaluating(network):
            run(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        if is_of_the_device(error):
            raise
        raise InvalidArgumentError(
            f"{subject.name} does not take images of {size} pixels: {first_line(error).rstrip('.')}; choose another "
            "image_size (--image-size), or leave it out."
        ) from error
