"""From a recipe to the network that is trained.

Heads over a tree are kept in level order while they are trained (:class:`wn21k_zoo.training.levels.Levels`), for the
sake of the loss's speed; :func:`reorder_head` goes there and back.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wn21k_zoo import building, convert, download, registry
from wn21k_zoo.checkpoints import Checkpoint
from wn21k_zoo.errors import (
    ModelError,
    OfflineError,
    RecipeError,
    RemoteNotFoundError,
    UnknownModelError,
    UnresolvedLabelSpaceError,
    Wn21kError,
    first_line,
    is_out_of_memory,
)
from wn21k_zoo.files import expanded
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.models import read_labels
from wn21k_zoo.running import evaluating
from wn21k_zoo.training.folder import composed
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.recipe import RANDOM, RESERVED, Recipe, check_architecture

__all__ = [
    "Normalized",
    "build_network",
    "check_head",
    "checkpoint_gradients",
    "few_for_statistics",
    "freeze_backbone",
    "heads_of",
    "is_place",
    "not_of_synsets",
    "refuse_run",
    "reorder_head",
    "resolved",
    "teacher_record",
    "train_head",
    "try_size",
    "wrong_size",
]


_LOG = logging.getLogger(__name__)
_ENOUGH = 32  # images for batch statistics: arXiv 1803.08494, figure 1


class Normalized(nn.Module):
    """A network behind a normalisation of its pixels.

    Args:
        module: Takes normalised images.
        mean: Subtracted per channel from pixels in [0, 1].
        std: Divided by, per channel.
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
        """Pixels in [0, 1], [batch, 3, height, width], to logits [batch, classes]."""
        logits: Tensor = self.module(images if self._identity else images * self.scale + self.shift)
        return logits


def build_network(
    recipe: Recipe, class_names: Sequence[str], levels: Levels | None, *, pretrained: bool = True
) -> nn.Module:
    """The network of a recipe, with the weights that it starts from, on the CPU.

    Args:
        recipe: Its architecture, start and arguments.
        class_names: Of the head's outputs, wnids where they are synsets.
        levels: In whose order the head is to be.
        pretrained: Whether weights that it starts from are needed, which then may be out of reach.

    Raises:
        RecipeError: There is no such architecture, its classifier cannot have such an order, or the start is of another
            one or the folder of a run.
        ModelError, UnknownModelError: The start cannot be had.
    """
    check_architecture(recipe.model.architecture)
    torch.manual_seed(recipe.run.seed)
    start, arguments = recipe.model.start, dict(recipe.model.arguments)
    try:
        if start is not None and start.startswith(RANDOM) and not is_place(start.removeprefix(RANDOM)):
            with contextlib.suppress(UnresolvedLabelSpaceError):
                registry.resolve_checkpoint(start.removeprefix(RANDOM))  # a trial finds a wrong name, too
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


def is_place(name: str) -> bool:
    """Whether a name of weights is that of a file, a folder or a Hub repository, not of a record or timm model."""
    is_path = name.startswith((building.HUB_PREFIX, building.FOLDER_PREFIX)) or building.looks_like_path(name)
    return is_path or name.endswith(".pt") or (Path(name).is_dir() and not registry.is_known(name))


def teacher_record(name: str) -> Checkpoint:
    """The record, or timm model, of a loss.teacher that is no place.

    Raises:
        UnknownModelError: There is none.
        RecipeError: Its classes are not known.
    """
    try:
        return registry.resolve_checkpoint(name)
    except UnresolvedLabelSpaceError:
        raise not_of_synsets(name) from None


def not_of_synsets(teacher: str) -> RecipeError:
    """What is said of a teacher whose classes nobody can map to others."""
    return RecipeError(
        f"The classes of loss.teacher {teacher} are not known to be synsets, which those of a teacher must be; name "
        "another one."
    )


def checkpoint_gradients(module: nn.Module, architecture: str) -> None:
    """Make a network compute again what it needs to go backward.

    Raises:
        RecipeError: It cannot.
    """
    try:
        cast(Any, module).set_grad_checkpointing()
    except (AssertionError, AttributeError):
        raise RecipeError(
            f"{architecture} has no gradient checkpointing; set model.gradient_checkpointing to false."
        ) from None


def _started(
    recipe: Recipe,
    start: str,
    class_names: Sequence[str],
    levels: Levels | None,
    arguments: dict[str, Any],
) -> nn.Module:
    refuse_run("model.start", start)
    keeps = _classes_of(start) == tuple(class_names)
    module = building.create_model(start, num_classes=None if keeps else len(class_names), **arguments)
    architecture = str(cast(Any, module).pretrained_cfg.get("architecture", "")).removeprefix(registry.TIMM_PREFIX)
    if architecture and architecture != recipe.model.architecture:
        module = _moved(module, start, architecture, recipe.model.architecture, len(class_names), arguments)
    if keeps and levels is not None and levels.order == "level":
        reorder_head(module, levels.columns)
    if not keeps:
        _calm_head(module)
    return module


def _moved(
    module: nn.Module, start: str, begun: str, architecture: str, num_classes: int, arguments: dict[str, Any]
) -> nn.Module:
    """The weights of one architecture in another that differs by biases which it lacks.

    The published code, too, loads what fits and leaves the rest.
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
    if os.environ.get("RANK", "0") == "0":
        left = f" but for {len(unused)} biases, such as {unused[0]}, for which there is no place" if unused else ""
        _LOG.warning("model.start %s is a %s; a %s takes its weights%s", start, begun, architecture, left)
    return target


def _calm_head(module: nn.Module) -> None:
    """Small weights for a new classifier on pretrained features.

    The initialisation of some of timm's networks depends on the number of outputs: with few of them the first logits
    are so large, and so wrong, that the first steps ruin the features.
    """
    for head in heads_of(module):
        if isinstance(head, (nn.Linear, nn.Conv2d)):
            nn.init.trunc_normal_(head.weight, std=0.01)
            if head.bias is not None:
                nn.init.zeros_(head.bias)


def _classes_of(start: str) -> tuple[str, ...] | None:
    """The classes of weights, None when they are not known before they are there.

    Raises:
        ModelError, UnknownModelError: What says so is damaged, or cannot be had.
    """
    if (labels := _file_of(start, building.LABELS_FILE)) is not None:
        return read_labels(labels)[0].wnids
    if (folder := building.configured_folder(start)) is not None:
        names = building.read_config(folder).get("label_names")
        return tuple(composed(str(name)) for name in names) if names else None
    try:
        return LabelSpace.load(registry.resolve_checkpoint(start).label_space).wnids
    except UnresolvedLabelSpaceError:
        return None


def _file_of(start: str, file: str) -> Path | None:
    """A file beside weights in a folder or, fetched, in a Hub repository; None when there is none, or is none offline.

    Raises:
        ModelError, UnknownModelError: There is no such folder, or the repository is out of reach.
    """
    if start.startswith(building.HUB_PREFIX):
        try:
            return download.fetch_file(building.hub_source(start), (file,)).path
        except (RemoteNotFoundError, OfflineError):
            return None
    folder = building.as_folder(start)
    return folder / file if folder is not None and (folder / file).is_file() else None


def resolved(recipe: Recipe, otherwise: Mapping[str, Any] | None = None) -> Recipe:
    """The same with whole paths, wnids for a file of them, and the arguments of the network that it starts from.

    Args:
        recipe: The recipe.
        otherwise: These arguments, where its start is no longer to be had.

    Raises:
        ModelError, UnknownModelError: The start cannot be had, and nobody else says what its arguments are.
    """
    recipe = recipe.model_copy(deep=True)
    recipe.model.start, recipe.loss.teacher = _whole(recipe.model.start), _whole(recipe.loss.teacher)
    space = recipe.data.space
    if space is not None and not space.is_shipped:
        recipe.data.label_space = space.wnids  # the file may go
    start = recipe.model.start
    if start is None or start.startswith(RANDOM) or not is_place(start):
        return recipe
    try:
        config = _file_of(start, building.CONFIG_FILE)
        known = _arguments_in(building.read_config(config.parent)) if config is not None else otherwise or {}
    except (ModelError, UnknownModelError):
        if otherwise is None:
            raise
        known = otherwise
    recipe.model.arguments = {**known, **recipe.model.arguments}
    return recipe


def _arguments_in(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of how its network is built, besides the architecture; as timm takes it."""
    settings, arguments = config.get("pretrained_cfg") or config, config.get("model_args")
    found: dict[str, Any] = {}
    if isinstance(settings, dict):
        if settings.get("fixed_input_size") and isinstance(settings.get("input_size"), list):
            found["img_size"] = settings["input_size"][-1]
        if settings.get("global_pool"):
            found["global_pool"] = settings["global_pool"]
    if isinstance(arguments, dict):
        found |= {name: value for name, value in arguments.items() if name not in RESERVED}
    return found


def _whole(name: str | None) -> str | None:
    """A name of weights; that of a folder or file of this machine as it is from any working directory."""
    if name is None or name.startswith((RANDOM, building.HUB_PREFIX)) or not is_place(name):
        return name
    path = expanded(name.removeprefix(building.FOLDER_PREFIX), RecipeError).absolute()
    return str(path.parent.resolve() / path.name)  # a link to a cache may have another name there


def wrong_size(what: str, size: int, error: Exception) -> RecipeError:
    """What is said of a network that does not take images of a size."""
    return RecipeError(
        f"{what} does not take images of {size} pixels: {first_line(error).rstrip('.')}; set data.size, or "
        f'model.arguments={{"img_size": {size}}} where the architecture takes that.'
    )


def few_for_statistics(module: nn.Module, recipe: Recipe, ranks: int) -> str:
    """What is said of batch statistics over one image, or over few because there are many ranks; else empty."""
    images, model = recipe.data.batch_size // ranks, recipe.model
    has_statistics = any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in module.modules())
    if not has_statistics or model.freeze_backbone or (model.sync_batchnorm and ranks > 1):
        return ""
    if recipe.micro_batches(ranks)[0] == 1:
        return f"batch normalisation over one image at a time hardly trains; a larger {recipe.bound} avoids that"
    if ranks == 1 or images >= min(_ENOUGH, recipe.data.batch_per_device):
        return ""
    return (
        f"batch normalisation over {images} images per process is another training than over more; "
        "model.sync_batchnorm=true, or a larger data.batch_size, avoids that"
    )


@torch.no_grad()
def try_size(module: nn.Module, size: int, device: torch.device, what: str, num_classes: int) -> None:
    """See that a network takes images of a size and gives a logit for each class.

    Raises:
        RecipeError: It does not.
    """
    try:
        with evaluating(module):
            logits = module(torch.zeros(1, 3, size, size, device=device))
    except (RuntimeError, AssertionError, ValueError) as error:
        if isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
            raise
        raise wrong_size(what, size, error) from error
    if not isinstance(logits, Tensor) or logits.shape != (1, num_classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise RecipeError(f"{what} gives {got} for an image, not [1, {num_classes}]; see its model.arguments.")


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


def refuse_run(field: str, name: str) -> None:
    """See that a name is not the folder of a run.

    Raises:
        RecipeError: It is.
    """
    if (hint := building.about_run(expanded(name, RecipeError))) is not None:
        raise RecipeError(f"{field} {name} {hint}")
