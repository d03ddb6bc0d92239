"""The settings of a run. A recipe is a Python function that takes another recipe and changes fields.

``training/recipes/`` has one file per architecture; your own file is used the same way::

    from wn21k_zoo.training.presets import in21k

    def mine():
        recipe = in21k("resnet50")
        recipe.optimizer.lr = 1e-3
        return recipe

    torchrun -m wn21k_zoo.training.train --recipe mine.py:mine --data DIR --output DIR --set schedule.epochs=40

Functions whose names begin with _ are not recipes. A field that does not exist, a value of the wrong type, or values
that do not go together are errors before anything starts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import typing
from collections.abc import Mapping
from types import MappingProxyType, UnionType
from typing import Any, Literal, cast

from wn21k_zoo import convert
from wn21k_zoo.checkpoints import Head
from wn21k_zoo.errors import MissingExtraError, RecipeError, Wn21kError, did_you_mean, first_line
from wn21k_zoo.files import parse_json
from wn21k_zoo.labels import LabelSpace

try:
    import pydantic
    import pydantic_core
except ImportError as error:
    raise MissingExtraError(f"Training ({error.name} is missing)", "train") from error

__all__ = [
    "ELSEWHERE",
    "NAME",
    "RANDOM",
    "Model",
    "Recipe",
    "Section",
    "is_drop_rate",
    "is_reserved",
    "near_field",
    "sized",
]

_EPOCHS, _STEPS, _EVALUATIONS = 20, 1000, 20  # where a recipe leaves them open
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # of a recipe, and of the record that it results in


# What other libraries call our fields.
ELSEWHERE = MappingProxyType({
    "amp": "precision", "batch": "batch_size", "ema": "ema_decay", "image_size": "size", "img_size": "size",
    "learning_rate": "lr", "model_ema": "ema_decay", "pretrained": "start", "smoothing": "label_smoothing",
})  # fmt: skip


class Section(pydantic.BaseModel):
    """A pydantic model that rejects unknown fields and values of wrong types with our error instead of pydantic's."""

    model_config = pydantic.ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False, validate_default=True
    )

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _text_and_truth_are_no_numbers(cls, value: Any, info: pydantic.ValidationInfo) -> Any:
        kind = cls.model_fields[info.field_name or ""].annotation
        if isinstance(value, bool) and kind is not bool:
            raise pydantic_core.PydanticCustomError("no_number", "Input should not be true or false")
        kinds = typing.get_args(kind) if typing.get_origin(kind) is UnionType else (kind,)
        if isinstance(value, (str, bytes)) and {int, float} & {*kinds}:
            raise pydantic_core.PydanticCustomError("no_number", "Input should be a number")
        if not isinstance(value, bool) and kind is bool:
            raise pydantic_core.PydanticCustomError("no_truth", "Input should be true or false")
        return value

    @pydantic.field_validator("*")
    @classmethod
    def _within_64_bits(cls, value: Any) -> Any:
        each = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        if any(isinstance(number, (int, float)) and abs(number) >= 2**63 for number in each):
            raise pydantic_core.PydanticCustomError("too_large", "Input should be within 64 bits")
        return value

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except pydantic.ValidationError as error:
            raise _as_recipe_error(type(self), error) from None

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            super().__setattr__(name, value)
        except pydantic.ValidationError as error:
            raise _as_recipe_error(type(self), error) from None


class Model(Section):
    """The network.

    Attributes:
        architecture: timm's name, or one of this package (``ofa_flops_595m_s``).
        start: Weights to start from: a record, a timm name with a known label space, a folder, or ``hf-hub:ORG/NAME``;
            None: random ones. Their head is kept if it has the same classes, in any order; a new head starts with
            small weights. Weights of another architecture are taken if biases are all that they have in addition. With
            the prefix ``random:``, as if they were there, but random, for a trial.
        freeze_backbone: Train only the classifier; all before it stays unchanged, batch statistics too, and
            is without dropout.
        arguments: More arguments for ``timm.create_model``, such as ``{"drop_path_rate": 0.1}``; none for which
            :func:`is_reserved` is true.
        mean: Per-channel mean, subtracted from pixels in [0, 1].
        std: Per-channel divisor.
        channels_last: Memory format of the weights and images.
        compile: Run the network through torch.compile, and its loss where the classes are in a tree.
        gradient_checkpointing: Compute activations twice and keep fewer.
        sync_batchnorm: Compute batch statistics over all ranks; on GPUs only. Torch then waits for the GPU in each
            layer.
    """

    architecture: str
    start: str | None = None
    freeze_backbone: bool = False
    arguments: dict[str, bool | int | float | str | tuple[int | float | str, ...]] = {}
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    channels_last: bool = True
    compile: bool = False
    gradient_checkpointing: bool = False
    sync_batchnorm: bool = False

    @pydantic.field_validator("arguments")
    @classmethod
    def _none_of_weights(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_arguments(value)
        return value


class Data(Section):
    """Images, their order and augmentation.

    Attributes:
        label_space: Classes of the head: the name of a label space, wnids, or a text file of them, such as those of
            your own tree with their ancestors; images of other classes are left out. None: those of the data, which for
            prepared shards are all of the label space that they were prepared for.
        size: Height and width in pixels.
        batch_size: Images of one optimizer step over all ranks; kept when the number of ranks changes.
        batch_per_device: Largest number of images that go through the network at a time; the rest is accumulated.
        augmentation: ``published`` (cutout and RandAugment), ``modern`` (random resized crop, flip, RandAugment, random
            erasing), ``finetune`` (random resized crop, flip) or ``none`` (as in evaluation).
        mixup: Blend the images of a batch in pairs, and their losses, with shares from the Beta distribution with this
            parameter (arXiv 1710.09412); 0: off.
        cutmix: The same with a rectangle of one in the other (arXiv 1905.04899); with both, each gets half the batches.
        crop_pct: Evaluation resizes the shorter side to size / crop_pct and crops the centre; None: squash.
        window: Number of shards that are mixed with each other.
        max_bad: Share of damaged samples that is tolerated; 1,000 times this number always are (ten for 0.01).
    """

    label_space: str | tuple[str, ...] | None = "fall11"
    size: int = pydantic.Field(default=224, ge=16)
    batch_size: int = pydantic.Field(default=512, ge=1)
    batch_per_device: int = pydantic.Field(default=64, ge=1)
    augmentation: Literal["published", "modern", "finetune", "none"] = "published"
    mixup: float = pydantic.Field(default=0.0, ge=0)
    cutmix: float = pydantic.Field(default=0.0, ge=0)
    crop_pct: float | None = pydantic.Field(default=None, gt=0, le=1)
    window: int = pydantic.Field(default=16, ge=1)
    max_bad: float = pydantic.Field(default=0.01, ge=0, le=1)

    @pydantic.field_validator("mixup", "cutmix")
    @classmethod
    def _enough_to_draw_from(cls, value: float) -> float:
        if 0 < value < 1e-6:
            raise pydantic_core.PydanticCustomError("too_small", "Input should be 0 or at least 1e-6")
        return value

    @pydantic.field_validator("label_space", mode="before")
    @classmethod
    def _classes(cls, value: Any) -> Any:
        if isinstance(value, LabelSpace):
            return value.name if value.is_shipped else value.wnids
        if isinstance(value, os.PathLike):
            return os.fspath(value)
        listed = isinstance(value, (list, tuple)) and all(isinstance(wnid, str) for wnid in value)
        if not (value is None or isinstance(value, str) or listed):  # a set has no stable order
            raise pydantic_core.PydanticCustomError("no_classes", "Give a name, a file or a list of wnids")
        return value

    @property
    def space(self) -> LabelSpace | None:
        """The label space.

        Raises:
            UnknownLabelSpaceError, LabelSpaceError, UnknownSynsetError: As :meth:`LabelSpace.find`.
        """
        named = self.label_space
        if isinstance(named, str):
            return LabelSpace.find(named)
        return None if named is None else LabelSpace("custom", named)


class Loss(Section):
    """What is minimised.

    Attributes:
        kind: A softmax per level of the tree, one over all classes, or a sigmoid per class and ancestor.
        label_smoothing: Share of the target that is spread over the level's, or all, classes.
        logit_adjustment: For classes with few images (arXiv 2007.07314), of ``single_label`` only: in training, the
            logarithm of each class's share of the images, times this, is added to its logits. 1 aims at the mean
            accuracy of all classes, 0 at that of all images.
        teacher: Network to distil: a record, a folder (such as an exported run), a Hub repository, or a checkpoint of a
            run (``RUN/checkpoints/best.pt``, which must stay unchanged); if it has other classes or another kind of
            head, it is read through the tree. For classes that are not synsets, it must be a softmax over the same.
        teacher_head: How to read the outputs of a teacher's folder or repository that does not say so.
        distillation_weight: Weight of the distillation loss, summed over classes and levels and averaged over images.
    """

    kind: Literal["semantic_softmax", "single_label", "multi_label"] = "semantic_softmax"
    label_smoothing: float = pydantic.Field(default=0.2, ge=0, lt=1)
    logit_adjustment: float = pydantic.Field(default=0.0, ge=0)
    teacher: str | None = None
    teacher_head: Head | None = None
    distillation_weight: float = pydantic.Field(default=0.0, ge=0)

    @property
    def head(self) -> Head:
        """How to read the outputs of a network that was trained with this loss."""
        heads: dict[str, Head] = {"single_label": "softmax", "multi_label": "sigmoid"}
        return heads.get(self.kind, "semantic_softmax")


class Optimizer(Section):
    """How weights are updated.

    Attributes:
        name: ``adam`` with weight decay as an L2 term of the gradient, as published; ``adamw`` with decoupled decay;
            ``lamb``, whose decay is part of what the trust ratio scales (arXiv 1904.00962); ``sgd`` with Nesterov
            momentum and the L2 term.
        lr: Highest learning rate, before the classifier and layer factors.
        weight_decay: Decay of weights with two or more dimensions; biases and one-dimensional parameters have none.
        momentum: Momentum of SGD.
        betas: Betas of the others.
        clip_norm: Norm to which gradients are clipped; None: no clipping.
        head_lr_factor: Ratio of the classifier's learning rate to that of the rest.
        layer_decay: Ratio of each layer's learning rate to that of the layer above it; timm says which layers a network
            has. To fine-tune transformers, 0.65 or 0.75 are usual (github.com/facebookresearch/mae).
    """

    name: Literal["adam", "adamw", "lamb", "sgd"] = "adam"
    lr: float = pydantic.Field(default=3e-4, gt=0)
    weight_decay: float = pydantic.Field(default=1e-4, ge=0)
    momentum: float = pydantic.Field(default=0.9, ge=0, lt=1)
    betas: tuple[float, float] = (0.9, 0.999)
    clip_norm: float | None = pydantic.Field(default=None, gt=0)
    head_lr_factor: float = pydantic.Field(default=1.0, gt=0)
    layer_decay: float = pydantic.Field(default=1.0, gt=0, le=1)


class Schedule(Section):
    """The learning rate over the run.

    Attributes:
        name: ``one_cycle`` (cosine up, cosine down), ``cosine`` (linear up, cosine down) or ``constant``.
        epochs: Times that each image is seen; None: 20, or with few images as many as give 1,000 steps.
        max_steps: Maximum number of steps; the schedule is shortened to match.
        warmup: Share of the steps in which the rate rises.
        start_divisor: The first rate is lr / start_divisor (cosine and constant: if there is a warmup).
        end_divisor: The last rate is the first one / end_divisor (one_cycle); the step after the last would have
            lr / end_divisor (cosine).
    """

    name: Literal["one_cycle", "cosine", "constant"] = "one_cycle"
    epochs: int | None = pydantic.Field(default=80, ge=1)
    max_steps: int | None = pydantic.Field(default=None, ge=1)
    warmup: float = pydantic.Field(default=0.1, ge=0, lt=1)
    start_divisor: float = pydantic.Field(default=20.0, ge=1)
    end_divisor: float = pydantic.Field(default=1e4, ge=1)


class Run(Section):
    """How a run executes: seed, precision, checkpoints, evaluation.

    Attributes:
        seed: Seed of the order of images, their augmentation, new weights and dropout.
        precision: Precision of the forward pass; ``fp16`` scales the loss. Matrix products and convolutions in ``fp32``
            are TF32 on GPUs that have it.
        ema_decay: Decay of a moving average of the weights, which is then evaluated and exported; None: no average.
        checkpoint_minutes: Longest time between checkpoints; each evaluation also writes one. This is also what a run
            loses if told to stop on a disk where its checkpoint cannot be written within 26 seconds.
        keep: Number of latest checkpoints to keep, besides the best.
        evaluate_every: Epochs between evaluations; the last epoch always ends with one. None: about 20 in all.
        evaluate_batches: Maximum number of batches to evaluate per rank, spread evenly over all shards, which are all
            fetched if they are remote; None: all.
        log_every: Steps between lines of metrics.jsonl; at least one line per epoch.
        deterministic: Use only deterministic algorithms; on the CPU they are anyway.
    """

    seed: int = pydantic.Field(default=0, ge=0)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    ema_decay: float | None = pydantic.Field(default=None, gt=0, lt=1)
    checkpoint_minutes: float = pydantic.Field(default=30.0, gt=0)
    keep: int = pydantic.Field(default=2, ge=1)
    evaluate_every: int | None = pydantic.Field(default=1, ge=1)
    evaluate_batches: int | None = pydantic.Field(default=None, ge=1)
    log_every: int = pydantic.Field(default=50, ge=1)
    deterministic: bool = False


class Recipe(Section):
    """Everything that decides what a run computes, except the data and the machine.

    Attributes:
        name: Name of the run's result, such as ``resnet50.miil_in21k``.
        model: The network.
        data: Images, their order and augmentation.
        loss: What is minimised.
        optimizer: How weights are updated.
        schedule: The learning rate over the run.
        run: Precision, seeds, checkpoints.

    Raises:
        RecipeError: At construction or assignment; for an unknown field it suggests the nearest names.
    """

    name: str
    model: Model
    data: Data = Data()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    run: Run = Run()

    def check(self) -> None:
        """Check that the values go together.

        Raises:
            RecipeError: They do not; says which.
        """
        if not NAME.fullmatch(self.name):
            raise RecipeError(f"name cannot be {self.name!r}: use letters, digits, dots, - and _.")
        _check_arguments(self.model.arguments)
        try:
            self.data.space  # noqa: B018
        except Wn21kError as error:
            raise RecipeError(f"data.label_space: {error}") from None
        problems = (
            (
                self.loss.teacher is not None and self.loss.distillation_weight == 0,
                "loss.teacher is set, but loss.distillation_weight is 0; set it, too, or remove the teacher.",
            ),
            (
                self.loss.teacher is None and self.loss.distillation_weight > 0,
                "loss.distillation_weight is set, but there is no loss.teacher.",
            ),
            (
                self.loss.teacher is None and self.loss.teacher_head is not None,
                "loss.teacher_head is set, but there is no loss.teacher.",
            ),
            (any(value < 1e-6 for value in self.model.std), "model.std must be at least 1e-6."),
            (
                self.model.freeze_backbone and self.model.start is None,
                "model.freeze_backbone would keep random weights; set model.start.",
            ),
            (
                self.data.augmentation == "published"
                and (self.model.mean, self.model.std) != ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
                "The published augmentation is not followed by a normalisation; set model.mean to zeros and model.std "
                "to ones, or another data.augmentation.",
            ),
            *self._ignored(),
            (
                self.loss.kind == "multi_label" and self.loss.teacher is not None,
                "multi_label cannot be distilled; remove loss.teacher, or choose another loss.kind.",
            ),
            (any(not 0 <= beta < 1 for beta in self.optimizer.betas), "optimizer.betas must be in [0, 1)."),
            (
                self.loss.kind != "single_label" and self.loss.logit_adjustment > 0,
                "loss.logit_adjustment is for single_label; set it to 0.",
            ),
            (
                self.loss.kind == "multi_label" and self.loss.label_smoothing > 0,
                "multi_label has no smoothing; set loss.label_smoothing to 0.",
            ),
        )
        for wrong, message in problems:
            if wrong:
                raise RecipeError(message)

    def _ignored(self) -> list[tuple[bool, str]]:
        """Return the checks for settings that would have no effect."""
        usual_optimizer, usual_schedule = Optimizer(), Schedule()
        name, schedule = self.optimizer.name, self.schedule.name
        return [
            (
                name != "sgd" and self.optimizer.momentum != usual_optimizer.momentum,
                f"optimizer.momentum is for sgd; {name} has optimizer.betas.",
            ),
            (
                name == "sgd" and self.optimizer.betas != usual_optimizer.betas,
                "optimizer.betas are not for sgd, which has optimizer.momentum.",
            ),
            (
                self.model.freeze_backbone and self.optimizer.layer_decay != usual_optimizer.layer_decay,
                "optimizer.layer_decay is for the layers that model.freeze_backbone keeps from changing.",
            ),
            (
                schedule == "constant" and self.schedule.end_divisor != usual_schedule.end_divisor,
                "schedule.end_divisor has no effect where schedule.name is constant.",
            ),
        ]

    def micro_batches(self, world_size: int) -> tuple[int, int]:
        """Return the images that go through the network at a time on each rank, and how many such batches make a step.

        Raises:
            RecipeError: The batch cannot be divided among that many ranks.
        """
        images, at_most = self.data.batch_size, self.data.batch_per_device
        if images % world_size:
            raise RecipeError(
                f"data.batch_size {images} cannot be divided among {world_size} processes; change one of them."
            )
        mine = images // world_size
        micro = max(size for size in range(1, min(mine, at_most) + 1) if mine % size == 0)
        if 4 * micro < min(mine, at_most):
            raise RecipeError(
                f"The {mine} images of each process per step can be divided evenly into parts of at most {micro}, far "
                f"below data.batch_per_device {at_most}; choose a data.batch_size with more divisors."
            )
        if micro == 1 and (self.data.mixup or self.data.cutmix):
            raise RecipeError(
                f"One image at a time cannot be mixed with another: raise {self.bound}, or set data.mixup and "
                "data.cutmix to 0."
            )
        return micro, mine // micro

    def steps(self, images: int) -> tuple[int, int]:
        """Return the steps of an epoch with this number of training images, and of the run.

        Raises:
            RecipeError: The images are not enough for one step.
        """
        of_epoch = images // self.data.batch_size
        if not of_epoch:
            raise RecipeError(
                f"{images:,} training images are fewer than data.batch_size {self.data.batch_size}; lower it."
            )
        of_run = (self.schedule.epochs or max(_EPOCHS, math.ceil(_STEPS / of_epoch))) * of_epoch
        return of_epoch, min(of_run, self.schedule.max_steps or of_run)

    def counted(self, images: int) -> Recipe:
        """Return a copy with ``schedule.epochs`` and ``run.evaluate_every`` filled in from the images where None.

        Raises:
            RecipeError: The images are not enough for one step.
        """
        of_epoch, of_run = self.steps(images)
        recipe = self.model_copy(deep=True)
        recipe.schedule.epochs = self.schedule.epochs or math.ceil(of_run / of_epoch)
        recipe.run.evaluate_every = self.run.evaluate_every or max(1, round(of_run / of_epoch / _EVALUATIONS))
        return recipe

    @property
    def bound(self) -> str:
        """The field that causes images to go through the network one at a time, where they do."""
        return "data.batch_per_device" if self.data.batch_per_device == 1 else "data.batch_size"

    def debug(self, processes: int = 1) -> Recipe:
        """Return a variant of two steps on the CPU, in seconds: few small images, start and teacher random.

        Images have 32 pixels, where the network takes that.
        """
        small = self.model_copy(deep=True)
        small.name = f"{self.name}_debug"
        small.data.batch_size, small.data.batch_per_device = max(4, 2 * processes), 2
        small.data.window = 1
        small.schedule.epochs, small.schedule.max_steps = 1, 2
        small.run.precision, small.run.evaluate_batches, small.run.log_every = "fp32", 1, 1
        small.model.compile = small.model.sync_batchnorm = False
        if (arguments := sized(self.model.architecture, self.model.arguments, 32)) is not None:
            small.data.size, small.model.arguments = 32, arguments
        small.model.start = small.model.start and f"{RANDOM}{small.model.start.removeprefix(RANDOM)}"
        small.loss.teacher = small.loss.teacher and f"{RANDOM}{small.loss.teacher.removeprefix(RANDOM)}"
        return small

    def to_json(self) -> str:
        """Return all fields as JSON, for people and :meth:`from_json` to read."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"

    @staticmethod
    def from_json(text: str) -> Recipe:
        """Read what :meth:`to_json` wrote.

        Raises:
            RecipeError: The text is something else.
        """
        try:
            return Recipe(**parse_json(text))
        except (ValueError, TypeError) as error:
            raise (
                error if isinstance(error, RecipeError) else RecipeError(f"Not a recipe: {first_line(error)}")
            ) from None


RANDOM = "random:"  # prefix of a name: that network, but without its weights


def is_reserved(argument: str) -> bool:
    """Whether an argument of ``timm.create_model`` is left to the data, other fields or verified fetching."""
    return argument in (*convert.OF_WEIGHTS, "features_only", "in_chans", "num_classes")


def is_drop_rate(argument: str) -> bool:
    """Whether an argument of ``timm.create_model`` is a rate of dropout or stochastic depth, which is for training."""
    return "drop" in argument and argument.endswith("_rate")


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    if reserved := sorted(filter(is_reserved, arguments)):
        raise RecipeError(
            f"model.arguments cannot have {reserved[0]!r}: the weights are those of model.start, the outputs the "
            "classes of the data."
        )
    for name, value in arguments.items():
        if is_drop_rate(name) and isinstance(value, (int, float)) and not 0 <= value <= 1:
            raise RecipeError(f"model.arguments.{name} cannot be {value!r}: it is a share, from 0 to 1.")


def sized(architecture: str, arguments: dict[str, Any], size: int) -> dict[str, Any] | None:
    """Return arguments with which a network takes images of a size, or None; nothing is computed or allocated.

    Transformers and mixers are built for one size, which can be chosen when building them.
    """
    choices = (arguments, {**arguments, "img_size": size})
    return next((chosen for chosen in choices if _takes(architecture, json.dumps(chosen), size)), None)


@functools.lru_cache(maxsize=64)
def _takes(architecture: str, arguments: str, size: int) -> bool:
    import torch

    with contextlib.suppress(Exception):  # timm has many ways to refuse
        with torch.device("meta"), torch.no_grad():
            convert.build(architecture, num_classes=2, **json.loads(arguments)).eval()(torch.empty(1, 3, size, size))
        return True
    return False


def near_field(name: str, section: type[Section]) -> str:
    """Suggest what was meant by a name that is no field of a section, or else list its fields."""
    near = did_you_mean(ELSEWHERE.get(name, name), section.model_fields)
    return near or f" Fields of {section.__name__.lower()}: {', '.join(section.model_fields)}."


_UNKNOWN = ("extra_forbidden", "no_such_attribute")


def _as_recipe_error(section: type[Section], error: pydantic.ValidationError) -> RecipeError:
    errors = error.errors(include_url=False)
    first = next((each for each in errors if each["type"] in _UNKNOWN), errors[0])  # a misspelt field is missing, too
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, RecipeError):  # from a section within this one
        return inner
    place = ".".join(str(part) for part in first["loc"][:2])  # the rest are the types that it could have
    where = section.__name__.lower()
    if first["type"] in _UNKNOWN:
        *sections, name = map(str, first["loc"])
        for each in sections:
            where, section = each, cast(type[Section], section.model_fields[each].annotation)
        near = near_field(name, section)
        return RecipeError(f"{where} has no field {name!r}.{near}")
    if first["type"] == "missing":
        return RecipeError(f"{where}.{place} is missing.")
    shown = repr(first["input"])
    shown = shown if len(shown) < 200 else f"{shown[:200]}..."
    usual = section.model_fields[str(first["loc"][0])].default if first["type"] == "tuple_type" else None
    hint = f"; write a list, such as {list(usual)}" if isinstance(usual, tuple) else ""
    return RecipeError(f"{where}.{place} cannot be {shown}: {first['msg']}{hint}.")
