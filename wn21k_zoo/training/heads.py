"""The classifier of a network, of whatever architecture: its order, its first weights, its training alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from wn21k_zoo.errors import RecipeError

__all__ = ["calm_head", "check_head", "freeze_backbone", "heads_of", "reorder_head", "train_head"]


def heads_of(module: nn.Module) -> list[nn.Module]:
    """Its classifier; or several, whose logits it averages, such as those of a distilled transformer."""
    head = cast(Any, module).get_classifier()
    several = isinstance(head, (tuple, list, nn.ModuleList))
    return [each for each in (head if several else [head]) if isinstance(each, nn.Module)]


def check_head(module: nn.Module, num_classes: int) -> None:
    """See that :func:`reorder_head` can do its work.

    Raises:
        RecipeError: It cannot.
    """
    heads = heads_of(module)
    if not heads or not all(
        isinstance(each, (nn.Linear, nn.Conv2d)) and len(each.weight) == num_classes for each in heads
    ):
        raise RecipeError(
            f"The classifier of {type(module).__name__} is no linear layer of {num_classes:,} outputs, which classes "
            "in a tree need; take another model.architecture."
        )


def reorder_head(module: nn.Module, index: Tensor) -> None:
    """Give the classifier's outputs another order: output i becomes what output index[i] was.

    Raises:
        RecipeError: Its classifier is no linear layer with as many outputs.
    """
    check_head(module, len(index))
    with torch.no_grad():
        for head in heads_of(module):
            for parameter in head.parameters(recurse=False):
                parameter.copy_(parameter[index.to(parameter.device)].clone())


def calm_head(module: nn.Module) -> None:
    """Small weights for a new classifier on pretrained features.

    The initialisation of some of timm's networks depends on the number of outputs: with few of them the first logits
    are so large, and so wrong, that the first steps ruin the features.
    """
    for head in heads_of(module):
        if isinstance(head, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(head.weight, std=0.01)
            if head.bias is not None:
                nn.init.zeros_(head.bias)


def freeze_backbone(module: nn.Module) -> None:
    """Let no training change the weights of what comes before the classifier.

    Raises:
        RecipeError: There is no classifier.
    """
    heads = heads_of(module)
    if not any(True for head in heads for _ in head.parameters()):
        raise RecipeError("The network has no classifier to train alone; set model.freeze_backbone to false.")
    module.requires_grad_(False)
    for head in heads:
        head.requires_grad_(True)


def train_head(module: nn.Module) -> None:
    """Let the classifier behave as in training, and what comes before it as in evaluation."""
    module.eval()
    for head in heads_of(module):
        head.train()
