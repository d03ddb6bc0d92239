"""The classifier of a network of any architecture: its output order, its initial weights, training it alone."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from wn21k_zoo.errors import RecipeError

__all__ = ["calm_head", "check_head", "freeze_backbone", "heads_of", "reorder_head", "train_head"]


def heads_of(module: nn.Module) -> list[nn.Module]:
    """Return a network's classifier, or several whose logits it averages, as in a distilled transformer."""
    head = cast(Any, module).get_classifier()
    several = isinstance(head, (tuple, list, nn.ModuleList))
    return [each for each in (head if several else [head]) if isinstance(each, nn.Module)]


def check_head(module: nn.Module, num_classes: int) -> None:
    """Check that :func:`reorder_head` can reorder a classifier.

    Raises:
        RecipeError: It cannot.
    """
    heads = heads_of(module)
    if not heads or not all(
        isinstance(each, (nn.Linear, nn.Conv2d)) and len(each.weight) == num_classes for each in heads
    ):
        raise RecipeError(
            f"The classifier of {type(module).__name__} is not a linear layer with {num_classes:,} outputs, which "
            "classes in a tree need; choose another model.architecture."
        )


def reorder_head(module: nn.Module, index: Tensor) -> None:
    """Reorder the classifier's outputs: output i becomes what output index[i] was.

    Raises:
        RecipeError: The classifier is not a linear layer with that many outputs.
    """
    check_head(module, len(index))
    with torch.no_grad():
        for head in heads_of(module):
            for parameter in head.parameters(recurse=False):
                parameter.copy_(parameter[index.to(parameter.device)].clone())


def calm_head(module: nn.Module) -> None:
    """Give a new classifier on pretrained features small weights.

    The initialisation of some timm networks depends on the number of outputs: with few outputs, the first logits are so
    large, and so wrong, that the first steps ruin the features.
    """
    for head in heads_of(module):
        if isinstance(head, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(head.weight, std=0.01)
            if head.bias is not None:
                nn.init.zeros_(head.bias)


def freeze_backbone(module: nn.Module) -> None:
    """Freeze the weights of everything before the classifier.

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
    """Put the classifier in training mode and everything before it in evaluation mode."""
    module.eval()
    for head in heads_of(module):
        head.train()
