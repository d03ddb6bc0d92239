"""Build the network that a recipe trains.

Heads over a tree are kept in level order during training (:class:`wn21k_zoo.training.levels.Levels`), which makes the
loss faster; :func:`wn21k_zoo.training.heads.reorder_head` converts to and from it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wn21k_zoo import building, convert, registry
from wn21k_zoo.errors import RecipeError, Wn21kError, first_line
from wn21k_zoo.running import evaluating
from wn21k_zoo.training.failures import is_of_the_device
from wn21k_zoo.training.heads import calm_head, check_head, reorder_head
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.recipe import RANDOM, Recipe
from wn21k_zoo.training.weights import classes_of, is_place, refuse_run, warn_if_missing

__all__ = ["Normalized", "build_network", "checkpoint_gradients", "few_for_statistics", "try_size", "wrong_size"]

_LOG = logging.getLogger(__name__)
_ENOUGH = 32  # images, for batch statistics: arXiv 1803.08494, figure 1


class Normalized(nn.Module):
    """A network with a normalisation of pixels before it.

    Args:
        module: The network, which takes normalised images.
        mean: Per-channel mean, subtracted from pixels in [0, 1].
        std: Per-channel divisor.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, module: nn.Module, mean: Iterable[float], std: Iterable[float]) -> None:
        super().__init__()
        self.module = module
        means, stds = torch.tensor([*mean]).view(3, 1, 1), torch.tensor([*std]).view(3, 1, 1)
        self.register_buffer("scale", 1 / stds, persistent=False)
        self.register_buffer("shift", -means / stds, persistent=False)
        self._identity = bool((means == 0).all() and (stds == 1).all())

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [batch, classes] from pixels in [0, 1], [batch, 3, height, width]."""
        logits: Tensor = self.module(images if self._identity else images * self.scale + self.shift)
        return logits


def build_network(
    recipe: Recipe, class_names: Sequence[str], levels: Levels | None, *, pretrained: bool = True
) -> nn.Module:
    """Build a recipe's network on the CPU, with the weights that it starts from.

    Args:
        recipe: Gives architecture, start and arguments.
        class_names: Names of the head's outputs, wnids where they are synsets.
        levels: The levels whose order the head gets.
        pretrained: Whether to load the starting weights; if not, they need not be available.

    Raises:
        RecipeError: There is no such architecture, its classifier cannot have that order, or the start has another
            architecture or is the folder of a run.
        ModelError, UnknownModelError: The starting weights are not available.
    """
    convert.check_architecture(recipe.model.architecture, RecipeError)
    torch.manual_seed(recipe.run.seed)
    start, arguments = recipe.model.start, dict(recipe.model.arguments)
    try:
        if start is not None and pretrained:
            _try_start(recipe, start, len(class_names))
        if start is None or start.startswith(RANDOM) or not pretrained:
            module = convert.build(recipe.model.architecture, num_classes=len(class_names), **arguments)
        else:
            module = _started(recipe, start, class_names, levels, arguments)
        if levels is not None:
            check_head(module, len(class_names))
    except Wn21kError:
        raise
    except Exception as error:  # timm has many ways to refuse an argument
        raise RecipeError(f"{recipe.model.architecture} cannot be built: {first_line(error)}") from error
    if recipe.model.gradient_checkpointing:
        checkpoint_gradients(module, recipe.model.architecture)
    return module


def _try_start(recipe: Recipe, start: str, num_classes: int) -> None:
    """Check without weights, before they are fetched or in a trial, what :func:`_started` checks with them."""
    architecture, arguments = recipe.model.architecture, dict(recipe.model.arguments)
    is_trial, start = start.startswith(RANDOM), start.removeprefix(RANDOM)
    if is_place(start):
        if is_trial:
            warn_if_missing("model.start", start)
        return
    begun = registry.resolve_checkpoint(start).architecture
    if begun != architecture:
        with torch.device("meta"):
            module = convert.build(begun, num_classes=num_classes, **arguments)
            _moved(module, start, begun, architecture, num_classes, arguments, quiet=not is_trial)


def _started(
    recipe: Recipe, start: str, class_names: Sequence[str], levels: Levels | None, arguments: dict[str, Any]
) -> nn.Module:
    refuse_run("model.start", start)
    theirs = classes_of(start) or ()
    keeps = len({*theirs}) == len(theirs) and sorted(theirs) == sorted(class_names)
    module = building.create_model(start, num_classes=None if keeps else len(class_names), **arguments)
    if keeps and theirs != tuple(class_names):
        at = {name: index for index, name in enumerate(theirs)}
        try:
            reorder_head(module, torch.tensor([at[name] for name in class_names]))
        except RecipeError:  # its classifier is no linear layer, so it needs a new one
            keeps = False
            if os.environ.get("RANK", "0") == "0":
                _LOG.warning("the classifier of model.start %s has another order and no rows: a new one is used", start)
            cast(Any, module).reset_classifier(len(class_names))
    architecture = str(cast(Any, module).pretrained_cfg.get("architecture", "")).removeprefix(registry.TIMM_PREFIX)
    if architecture and architecture != recipe.model.architecture:
        module = _moved(module, start, architecture, recipe.model.architecture, len(class_names), arguments)
    if keeps and levels is not None and levels.order == "level":
        reorder_head(module, levels.columns)
    if not keeps:
        calm_head(module)
    return module


def _moved(
    module: nn.Module,
    start: str,
    begun: str,
    architecture: str,
    num_classes: int,
    arguments: dict[str, Any],
    quiet: bool = False,
) -> nn.Module:
    """Move the weights of one architecture to another that lacks some of its biases.

    The published code, too, loads what fits and leaves out the rest.
    """
    target = convert.build(architecture, num_classes=num_classes, **arguments)
    weights, wanted, modules = module.state_dict(), target.state_dict(), dict(target.named_modules())
    unused = sorted(set(weights) - set(wanted))
    if any(name not in weights or weights[name].shape != value.shape for name, value in wanted.items()) or any(
        not name.endswith(".bias") or name.removesuffix(".bias") not in modules for name in unused
    ):
        raise RecipeError(
            f"model.start {start} is a {begun}, not a {architecture}; set model.architecture to {begun}, or "
            "model.start to null."
        )
    target.load_state_dict({name: weights[name] for name in wanted})
    if os.environ.get("RANK", "0") == "0" and not quiet:
        left = f" but for {len(unused)} biases, such as {unused[0]}, which it does not have" if unused else ""
        _LOG.warning("model.start %s is a %s; a %s takes its weights%s", start, begun, architecture, left)
    return target


def checkpoint_gradients(module: nn.Module, architecture: str) -> None:
    """Switch on gradient checkpointing: recompute activations in the backward pass.

    Raises:
        RecipeError: The network does not support it.
    """
    try:
        cast(Any, module).set_grad_checkpointing()
    except (AssertionError, AttributeError):
        raise RecipeError(
            f"{architecture} has no gradient checkpointing; set model.gradient_checkpointing to false."
        ) from None


def few_for_statistics(module: nn.Module, recipe: Recipe, ranks: int) -> str:
    """Return a remark on batch statistics over one image, or over few because of many ranks; else an empty string."""
    images, model = recipe.data.batch_size // ranks, recipe.model
    has_statistics = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())
    if not has_statistics or model.freeze_backbone or (model.sync_batchnorm and ranks > 1):
        return ""
    if recipe.micro_batches(ranks)[0] == 1:
        return f"batch normalisation over one image at a time hardly trains; a larger {recipe.bound} avoids that"
    if ranks == 1 or images >= min(_ENOUGH, recipe.data.batch_per_device):
        return ""
    return (
        f"batch normalisation over {images} images per process trains differently than over more; "
        "model.sync_batchnorm=true, or a larger data.batch_size, avoids that"
    )


@torch.no_grad()
def try_size(module: nn.Module, size: int, device: torch.device, what: str, num_classes: int) -> None:
    """Check that a network takes images of a size and returns a logit for each class.

    Raises:
        RecipeError: It does not.
    """
    try:
        with evaluating(module):
            logits = module(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError, TypeError, IndexError) as error:
        if is_of_the_device(error):
            raise
        raise wrong_size(what, size, error) from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(f"{what} returns {got} for an image, not [1, {num_classes}]; check its model.arguments.")


def wrong_size(what: str, size: int, error: Exception) -> RecipeError:
    """Return the error for a network that does not take images of a size."""
    return RecipeError(
        f"{what} does not take images of {size} pixels: {first_line(error).rstrip('.')}; set data.size, or "
        f"model.arguments.img_size={size} where the architecture takes that."
    )
