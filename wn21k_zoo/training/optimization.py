"""What a network is trained with: loss, optimizer, schedule, moving average."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from wn21k_zoo.errors import NonFiniteError, RecipeError
from wn21k_zoo.training.heads import heads_of
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.losses import (
    MultiLabelLoss,
    SemanticDistillationLoss,
    SemanticSoftmaxLoss,
    SingleLabelLoss,
    softmax_distance,
)
from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.tree import SemanticTree

if TYPE_CHECKING:
    from timm.utils import ModelEmaV3

__all__ = ["Criterion", "average_of", "build_optimizer", "build_schedule"]


class Criterion(nn.Module):
    """The loss of a recipe.

    Args:
        recipe: Gives kind, smoothing and distillation.
        tree: The classes and their hierarchy; None without one.
        images: Number of training images of each class, [N] in the label space's order, for ``loss.logit_adjustment``.
    """

    adjustment: Tensor | None

    def __init__(self, recipe: Recipe, tree: SemanticTree | None, images: NDArray[np.int64] | None = None) -> None:
        super().__init__()
        smoothing = recipe.loss.label_smoothing
        self.weight = recipe.loss.distillation_weight
        self.smoothing = smoothing
        self.loss: nn.Module | None = None
        adjustment = None
        if images is not None:
            share = np.log(images.clip(1) / images.sum())  # the logits of a class without images are not -inf
            adjustment = torch.from_numpy(recipe.loss.logit_adjustment * share).float()
            if tree is not None:
                adjustment = adjustment[Levels(tree, "level").columns]
        self.register_buffer("adjustment", adjustment, persistent=False)
        if tree is not None:
            self.loss = {  # type: ignore[no-untyped-call]
                "semantic_softmax": lambda: SemanticSoftmaxLoss(tree, smoothing, "level"),
                "single_label": lambda: SingleLabelLoss(tree, smoothing, "level"),
                "multi_label": lambda: MultiLabelLoss(tree, order="level"),
            }[recipe.loss.kind]()
        self.distillation: nn.Module | None = None
        if tree is not None and self.weight:
            self.distillation = SemanticDistillationLoss(tree, "level", recipe.loss.kind == "semantic_softmax")

    def forward(self, logits: Tensor, targets: Tensor, teacher: Tensor | None = None, share: float = 1.0) -> Tensor:
        """Return the mean over a batch; both networks' logits, [batch, classes], are in level order if there is a tree.

        For mixed images (:func:`wn21k_zoo.training.mixing.mix`), ``share`` is the weight of the loss for the targets;
        the rest is that of the loss for the targets in reverse order. A loss that is not finite is NaN here and not an
        error, so that all ranks reach the point where they agree to stop.
        """
        try:
            loss = self._of(logits, targets)
            if share < 1:
                loss = share * loss + (1 - share) * self._of(logits, targets.flip(0))
            if teacher is not None:
                loss = loss + self.weight / len(targets) * self._distance(logits, teacher)
        except NonFiniteError:
            return logits.float().sum() * math.nan
        return loss

    def _distance(self, logits: Tensor, teacher: Tensor) -> Tensor:
        if self.distillation is None:
            return softmax_distance(logits.float(), teacher.detach().float()).sum()
        distance: Tensor = self.distillation(logits, teacher)
        return distance

    def _of(self, logits: Tensor, targets: Tensor) -> Tensor:
        if self.adjustment is not None:
            logits = logits.float() + self.adjustment
        if self.loss is None:
            return F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing)
        loss: Tensor = self.loss(logits, targets)
        return loss


def build_optimizer(recipe: Recipe, module: nn.Module) -> Optimizer:
    """Build a recipe's optimizer; biases and one-dimensional parameters have no weight decay, as published.

    With AdamW and LAMB, which published recipes of later networks use, neither do the parameters that a timm network
    exempts, such as position embeddings.

    Raises:
        RecipeError: The recipe has learning rates for a classifier or layers that the network does not have.
    """
    settings = recipe.optimizer
    exempt: set[str] = set()
    if settings.name in ("adamw", "lamb"):
        exempt = set(getattr(module, "no_weight_decay", set)())
    of_head = {id(parameter) for head in heads_of(module) for parameter in head.parameters()}
    if settings.head_lr_factor != 1 and not of_head:
        raise RecipeError("The network has no classifier for optimizer.head_lr_factor to apply to; set it to 1.")
    above = _layers_above(module) if settings.layer_decay != 1 else {}
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim >= 2 and not any(fnmatchcase(name, pattern) for pattern in exempt)
            in_head = id(parameter) in of_head
            groups.setdefault((in_head, 0 if in_head else above.get(name, 0), decays), []).append(parameter)
    parameters = [
        {
            "params": members,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "lr": settings.lr * (settings.head_lr_factor if in_head else settings.layer_decay**depth),
        }
        for (in_head, depth, decays), members in sorted(groups.items(), key=lambda item: item[0])
    ]
    # In fp16, optimizers that are not fused make the host wait for a GPU at each step.
    fused = True if next(module.parameters()).device.type == "cuda" else None
    if settings.name == "sgd":
        # If an overflow in fp16 makes a fused one skip its first step, it goes on with uninitialised momenta.
        fused = None if recipe.run.precision == "fp16" else fused
        return torch.optim.SGD(
            parameters, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=fused
        )
    if settings.name == "lamb":
        from timm.optim.lamb import Lamb

        # Its own clipping would be in addition to clip_norm.
        return cast(Optimizer, Lamb(parameters, lr=settings.lr, betas=settings.betas, max_grad_norm=None))
    kind = torch.optim.Adam if settings.name == "adam" else torch.optim.AdamW
    return kind(parameters, lr=settings.lr, betas=settings.betas, fused=fused)


def _layers_above(module: nn.Module) -> dict[str, int]:
    """Return the number of layers above each parameter's own, including the classifier."""
    from timm.models import group_parameters

    try:
        layers = group_parameters(module, cast(Any, module).group_matcher(coarse=False), reverse=True)
    except AttributeError:
        raise RecipeError(
            f"The layers of {type(module).__name__} are not known; set optimizer.layer_decay to 1."
        ) from None
    last = max(layers.values())
    return {name: last - layer for name, layer in layers.items()}


def build_schedule(recipe: Recipe, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Build a recipe's schedule over a number of steps."""
    settings = recipe.schedule
    warmup = round(settings.warmup * steps)
    if settings.name == "one_cycle" and steps > 1:
        return OneCycleLR(
            optimizer,
            max_lr=[group["lr"] for group in optimizer.param_groups],
            total_steps=steps,
            # With no warm-up step it would divide by zero.
            pct_start=max(settings.warmup, 1.001 / steps),
            div_factor=settings.start_divisor,
            final_div_factor=settings.end_divisor,
            cycle_momentum=False,
        )

    def factor(step: int) -> float:
        if step < warmup:
            first = 1 / settings.start_divisor
            return first + (1 - first) * step / warmup
        if settings.name == "constant":
            return 1.0
        last = 1 / settings.end_divisor
        fallen = min(1.0, (step - warmup) / max(1, steps - warmup))
        return last + (1 - last) * (1 + math.cos(math.pi * fallen)) / 2

    return LambdaLR(optimizer, factor)


def average_of(module: nn.Module, decay: float) -> ModelEmaV3:
    """Build a network's moving average, batch statistics included: those of live weights do not fit averaged ones.

    At first it spans only a tenth of the steps so far, else the initial weights would dominate it in a short run: at
    step t the decay is (t - 1) / (t + 9) at most, about as in TensorFlow's ExponentialMovingAverage.

    Buffers that are not floating-point are copied. torch's own class averages them, too, and rounds down, which makes
    indices into tables of position biases wrong. It also makes the host wait for a GPU at each update.
    """
    from timm.utils import ModelEmaV3

    return ModelEmaV3(module, decay, use_warmup=True, warmup_gamma=10.0, warmup_power=1.0)
