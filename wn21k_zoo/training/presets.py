"""Recipes to start from: what is published about arXiv 2104.10972, and what is not, in one place.

``training/recipes/`` has one file per architecture that takes these and changes fields.

Published (the paper, its repository Alibaba-MIIL/ImageNet21K and that repository's issues): start from ImageNet-1K
weights, those of timm where it has some; Adam, learning rate 3e-4, coupled weight decay 1e-4 on all but biases and
one-dimensional parameters; one cycle with 10 % warm-up from 1/20; 80 epochs; 8 GPUs, TResNet-M with 416 images on each
and ViT with 64 (issue 17); mixed precision; label smoothing 0.2; squash to 224, cutout, RandAugment, no normalisation.
Distillation, with TResNet-L V2 or ViT-B as good teachers (issue 35). From scratch, for one softmax over all classes:
140 epochs, SGD without momentum, learning rate 1e-2 (train_single_label_from_scratch.py). Fine-tuning: Adam, learning
rate 2e-4 (issue 5); on ImageNet-1K otherwise like the usual training there (issue 21), and distilled (issue 9); on
CIFAR-100 a complete command (Transfer_learning.md: 128 images, 50 epochs, cosine, moving average 0.995, smoothing 0.1,
random erasing 0.5; SGD at 2e-4 was better than Adam), and for ViT SGD at 1e-2 (issue 40). Throughputs of a V100, the
highest available.

Not published, and chosen here: the batch of the other networks, 512, the default of the published script; the weight of
distillation, and its form in fine-tuning; which ImageNet-1K weights they started from; batch, epochs, smoothing,
schedule and moving average of fine-tuning on ImageNet-1K, whose images are squashed in training as published and
cropped in evaluation as timm does for the published results; semantic softmax and distillation from scratch; all of
:func:`finetune`, which is for folders of any size; the ``modern`` family.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from wn21k_zoo import building, registry
from wn21k_zoo.errors import ModelError, RecipeError, UnknownModelError, did_you_mean
from wn21k_zoo.files import expanded
from wn21k_zoo.training.recipe import Model, Recipe

__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "finetune",
    "from_scratch",
    "in1k",
    "in21k",
    "modern",
    "multi_label",
    "single_label",
    "winter21",
    "without_distillation",
]

# Used to distil the stand-in of training/results, for 2.6 points of semantic top-1. Not tried on ImageNet-21K. Weights
# the mean over a batch: the published function sums over it, so for 64 images a weight of 1 there is 64 here.
DISTILLATION_WEIGHT = 10.0
_EPOCHS_FROM_SCRATCH = 140


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What is known about training an architecture.

    Attributes:
        record: Name of the published 21K-P checkpoint.
        start: ImageNet-1K weights that have not seen ImageNet-21K and existed when the paper appeared, or None.
        teacher: Record of the distillation teacher.
        train_speed: Published images per second of training on one V100 in mixed precision.
        batch: Images per step of pretraining, on 8 GPUs.
        max_batch: Published largest batch on a V100, 90 % of which was used to measure speeds; None if not published.
        speed_note: What else is published about the speed.
        infer_speed: Published images per second of inference on one V100.
    """

    record: str
    start: str | None
    teacher: str = "tresnet_v2_l.miil_in21k"
    train_speed: float
    infer_speed: float
    batch: int = 512
    max_batch: int | None = None
    speed_note: str = ""


ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "mobilenetv3_large_100": Architecture(
            record="mobilenetv3_large_100.miil_in21k", start="mobilenetv3_large_100.ra_in1k",
            train_speed=1210, infer_speed=5980, max_batch=488,
        ),
        "ofa_flops_595m_s": Architecture(
            record="ofa_flops_595m_s.miil_in21k", start=None,
            train_speed=500, infer_speed=3240, max_batch=288,
        ),
        "resnet50": Architecture(
            record="resnet50.miil_in21k", start="resnet50.ram_in1k",
            train_speed=720, infer_speed=2760, max_batch=320,
        ),
        "mixer_b16_224": Architecture(
            # Not fine-tuned from 21K, whatever its name: https://github.com/huggingface/pytorch-image-models/pull/651
            record="mixer_b16_224.miil_in21k", start="mixer_b16_224.goog_in21k_ft_in1k",
            train_speed=420, infer_speed=1420,
        ),
        "tresnet_m": Architecture(
            record="tresnet_m.miil_in21k", start="tresnet_m.miil_in1k",
            train_speed=670, infer_speed=2970, max_batch=520, batch=3328,
        ),
        "tresnet_v2_l": Architecture(
            record="tresnet_v2_l.miil_in21k", start=None, teacher="vit_base_patch16_224_miil.in21k",
            train_speed=300, infer_speed=1460, max_batch=240,
        ),
        "vit_base_patch16_224_miil": Architecture(
            # The same network except for the biases of queries, keys and values, which this one does not have.
            record="vit_base_patch16_224_miil.in21k", start="deit_base_patch16_224.fb_in1k",
            train_speed=340, infer_speed=1140, max_batch=160,
            speed_note="; in apex's O2, which is faster than autocast",
        ),
    }
)  # fmt: skip
"""timm's name of each architecture with a published checkpoint; figures from the paper."""


def in21k(architecture: str, start: str | None = None) -> Recipe:
    """Pretraining on ImageNet-21K-P (fall11) with the published settings, and distillation, whose weight is ours.

    Args:
        architecture: One of :data:`ARCHITECTURES`.
        start: ImageNet-1K weights to start from, as in :class:`wn21k_zoo.training.recipe.Model`. If none are given or
            known, the recipe is :func:`from_scratch`, which is not how the published checkpoint was trained.
    """
    known = _known(architecture)
    recipe = Recipe(name=known.record, model=Model(architecture=architecture, start=start or known.start))
    recipe.data.batch_size, recipe.data.batch_per_device = known.batch, known.batch // 8
    recipe.run.precision = "fp16"
    recipe.loss.teacher, recipe.loss.distillation_weight = known.teacher, DISTILLATION_WEIGHT
    return recipe if recipe.model.start else from_scratch(recipe)


def without_distillation(recipe: Recipe) -> Recipe:
    """The same recipe without a teacher."""
    recipe = _without_teacher(recipe)
    recipe.name = f"{recipe.name}_without_distillation"
    return recipe


def winter21(recipe: Recipe) -> Recipe:
    """The same recipe on the winter 2021 release, without a teacher: the published ones were trained on fall11.

    ``loss.teacher`` may still be set to one: it is read through the tree.
    """
    recipe = _without_teacher(recipe)
    recipe.name = f"{recipe.name}_winter21"
    recipe.data.label_space = "winter21"
    return recipe


def from_scratch(recipe: Recipe) -> Recipe:
    """The same recipe from random weights: 140 epochs, SGD without momentum, learning rate 1e-2, 8 GPUs of 64 images.

    Published for :func:`single_label`; semantic softmax and distillation are our addition, not tried on ImageNet-21K.
    At first the gradient of semantic softmax is ten times that of a single label, or more, and with SGD so are the
    first steps; set ``optimizer.clip_norm`` if a run starts badly.
    """
    recipe = recipe.model_copy(deep=True)
    recipe.name = f"{recipe.name}_from_scratch"
    recipe.model.start = None
    recipe.data.batch_size, recipe.data.batch_per_device = 512, 64
    recipe.schedule.epochs = _EPOCHS_FROM_SCRATCH
    recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.momentum = "sgd", 1e-2, 0.0
    return recipe


def single_label(recipe: Recipe) -> Recipe:
    """The paper's first baseline: one softmax over all classes."""
    recipe = _without_teacher(recipe)
    recipe.name, recipe.loss.kind = f"{recipe.name}_single_label", "single_label"
    return recipe


def multi_label(recipe: Recipe) -> Recipe:
    """The paper's second baseline: a sigmoid per class and ancestor, with the asymmetric loss."""
    recipe = _without_teacher(recipe)
    recipe.name, recipe.loss.kind = f"{recipe.name}_multi_label", "multi_label"
    recipe.loss.label_smoothing = 0.0
    return recipe


def modern(architecture: str, start: str | None = None) -> Recipe:
    """What we would do today: AdamW or LAMB, cosine, moving average, bf16, stronger augmentation; not tried.

    LAMB for the networks with batch normalisation, as in arXiv 2110.00476; AdamW and stochastic depth for the others,
    as in arXiv 2106.10270, at the upper end of the learning rates that the authors recommend with Adam for this very
    transfer (2e-4 to 5e-4: issue 17 of their repository); with the mixup of both. Starts from ImageNet-1K weights where
    ``start`` or :data:`ARCHITECTURES` has some, else from random ones and for more epochs.

    It crops, down to 8 % of an image: shards made by ``wn21k data prepare --resize short-edge --size 256`` or larger
    give it more to see than squashed ones of 224 pixels. Gradients are clipped to the norm usual for a single label;
    those of semantic softmax start at ten times that or more, so at first they are clipped in each step, which matters
    little to AdamW and LAMB.
    """
    known = _known(architecture)
    start = start or known.start
    recipe = Recipe(name=f"{architecture}.modern_in21k", model=Model(architecture=architecture, start=start))
    recipe.data.augmentation, recipe.data.batch_size, recipe.data.batch_per_device = "modern", 1024, 128
    recipe.schedule.name, recipe.schedule.warmup = "cosine", 0.05
    recipe.schedule.epochs = 90 if start else _EPOCHS_FROM_SCRATCH
    recipe.schedule.start_divisor, recipe.schedule.end_divisor = 1000.0, 1000.0
    if architecture.startswith(("vit_", "mixer_")):
        recipe.data.mixup = 0.2
        recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay = "adamw", 5e-4, 0.03
        recipe.model.arguments = {"drop_path_rate": 0.1}
    else:
        recipe.data.mixup, recipe.data.cutmix = 0.1, 1.0
        recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay = "lamb", 3e-3, 0.02
    recipe.optimizer.clip_norm = 1.0
    recipe.run.precision, recipe.run.ema_decay = "bf16", 0.9999
    return recipe


def in1k(architecture: str) -> Recipe:
    """Fine-tuning of the published 21K-P checkpoint on ImageNet-1K, distilled from the fine-tuned teacher."""
    known = _known(architecture)
    recipe = Recipe(name=f"{known.record}_ft_in1k", model=Model(architecture=architecture, start=known.record))
    recipe.data.label_space, recipe.data.crop_pct = "imagenet1k", 0.875
    recipe.loss.kind, recipe.loss.label_smoothing = "single_label", 0.1
    recipe.loss.teacher, recipe.loss.distillation_weight = f"{known.teacher}_ft_in1k", DISTILLATION_WEIGHT
    recipe.schedule.epochs = 40
    recipe.optimizer.lr = 2e-4
    recipe.run.precision, recipe.run.ema_decay = "fp16", 0.9997
    return recipe


def finetune(start: str | os.PathLike[str] = "mobilenetv3_large_100.miil_in21k") -> Recipe:
    """Fine-tuning of weights on one's own folder of class folders.

    Args:
        start: A record, a timm name with a known label space, a folder such as an exported run, or ``hf-hub:ORG/NAME``.

    Raises:
        UnknownModelError, UnresolvedLabelSpaceError: There are no such weights, or timm's have unknown classes.
        ModelError: The folder or repository does not say what they are.
    """
    if isinstance(start, os.PathLike):
        start = str(expanded(start, UnknownModelError).absolute())  # a folder, also without a slash
    name, architecture, size, mean, std, crop_pct = _described(start)
    name = re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip("._-") or architecture
    recipe = Recipe(name=f"{name}_finetuned", model=Model(architecture=architecture, start=start))
    recipe.model.mean, recipe.model.std = mean, std
    recipe.data.label_space, recipe.data.size, recipe.data.crop_pct = None, size, crop_pct
    recipe.data.augmentation, recipe.data.batch_size = "finetune", 32
    recipe.loss.kind, recipe.loss.label_smoothing = "single_label", 0.1
    recipe.optimizer.name, recipe.optimizer.lr, recipe.optimizer.weight_decay = "adamw", 1e-4, 0.05
    recipe.optimizer.head_lr_factor, recipe.optimizer.clip_norm = 10.0, 1.0
    recipe.schedule.name, recipe.schedule.epochs = "cosine", None
    recipe.run.precision, recipe.run.evaluate_every = "fp32", None
    return recipe


def _described(start: str) -> tuple[str, str, int, Any, Any, float | None]:
    """Return the name, architecture, pixels, mean, std and centre crop share (None for a squash) of weights."""
    folder = building.configured_folder(start)
    if folder is None:
        checkpoint = registry.resolve_checkpoint(start)
        crop = None if checkpoint.resize == "squash" else checkpoint.crop_pct
        name, size = checkpoint.name, checkpoint.input_size[1]
        return name, checkpoint.architecture, size, checkpoint.mean, checkpoint.std, crop
    config = building.read_config(folder)
    settings = building.settings_of(config)
    if missing := [key for key in ("input_size", "mean", "std") if key not in settings]:
        raise ModelError(f"{folder / building.CONFIG_FILE}: {missing[0]} is not stated.")
    crop = None if settings.get("crop_mode") == "squash" else settings.get("crop_pct", 0.875)
    architecture = str(config["architecture"]).removeprefix(registry.TIMM_PREFIX)
    is_remote = start.startswith(building.HUB_PREFIX)
    name = start.partition("@")[0].rpartition("/")[2] if is_remote else folder.resolve().name
    return name, architecture, int(settings["input_size"][1]), settings["mean"], settings["std"], crop


def _without_teacher(recipe: Recipe) -> Recipe:
    recipe = recipe.model_copy(deep=True)
    recipe.loss.teacher, recipe.loss.teacher_head, recipe.loss.distillation_weight = None, None, 0.0
    return recipe


def _known(architecture: str) -> Architecture:
    if architecture not in ARCHITECTURES:
        raise RecipeError(
            f"Nothing is published about {architecture!r}.{did_you_mean(architecture, ARCHITECTURES)} Known: "
            f"{', '.join(ARCHITECTURES)}; for others write your own Recipe."
        )
    return ARCHITECTURES[architecture]
