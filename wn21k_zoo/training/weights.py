"""What the name of a start or teacher means: a record, file, folder or repository, and its classes."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wn21k_zoo import building, registry
from wn21k_zoo.checkpoints import Checkpoint
from wn21k_zoo.errors import RecipeError, RunError, UnknownModelError, UnresolvedLabelSpaceError, Wn21kError
from wn21k_zoo.files import expanded
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.models import outputs_of
from wn21k_zoo.training.folder import composed
from wn21k_zoo.training.recipe import RANDOM, Recipe, is_drop_rate, is_reserved

__all__ = [
    "checkpoint_file",
    "classes_of",
    "is_place",
    "not_of_synsets",
    "refuse_run",
    "resolved",
    "teacher_record",
    "warn_if_missing",
]

_LOG = logging.getLogger(__name__)


def is_place(name: str) -> bool:
    """Whether a name of weights means a file, a folder or a Hub repository, not a record or timm model."""
    is_path = name.startswith((building.HUB_PREFIX, building.FOLDER_PREFIX)) or building.looks_like_path(name)
    if is_path or name.endswith(".pt"):
        return True
    return not registry.is_known(name) and expanded(name, UnknownModelError).exists()


def teacher_record(name: str) -> Checkpoint:
    """The record, or timm model, of a loss.teacher that is not a place (:func:`is_place`).

    Raises:
        UnknownModelError: There is none.
        RecipeError: Its classes are not known.
    """
    try:
        return registry.resolve_checkpoint(name)
    except UnresolvedLabelSpaceError:
        raise not_of_synsets(name) from None


def not_of_synsets(teacher: str) -> RecipeError:
    """The error for a teacher whose classes cannot be mapped to others."""
    return RecipeError(
        f"The classes of loss.teacher {teacher} are not known to be synsets, so they say nothing about those of the "
        "data; name another one."
    )


def refuse_run(field: str, name: str) -> None:
    """Check that a name is not the folder of a run.

    Raises:
        RecipeError: It is.
    """
    if (hint := building.about_run(expanded(name, RecipeError))) is not None:
        raise RecipeError(f"{field} {name} {hint}")


def checkpoint_file(file: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a checkpoint.

    Raises:
        RunError: There is no such file.
    """
    path = expanded(file, RunError).absolute()
    if not path.is_file():
        raise RunError(f"There is no checkpoint {path}.")
    return path


def warn_if_missing(field: str, name: str) -> None:
    """Warn in a trial or plan, which needs no weights, that the run will not find them; the Hub is not asked."""
    if name.startswith(building.HUB_PREFIX) or os.environ.get("RANK", "0") != "0":
        return
    try:
        if name.endswith(".pt") and field == "loss.teacher":
            checkpoint_file(name)
            return
        refuse_run(field, name)
        if (folder := building.configured_folder(name)) is not None:
            building.read_config(folder)
    except Wn21kError as error:
        _LOG.warning("the run itself will not start yet, because of %s: %s", field, error)


def classes_of(start: str) -> tuple[str, ...] | None:
    """The classes of weights, or None if they are not known without the weights.

    Raises:
        ModelError, UnknownModelError: The configuration is damaged, or cannot be obtained.
    """
    try:
        if (folder := building.configured_folder(start)) is not None:
            classes, _ = outputs_of(building.read_config(folder), folder)
            return tuple(map(composed, classes))
        return LabelSpace.load(registry.resolve_checkpoint(start).label_space).wnids
    except UnresolvedLabelSpaceError:
        return None


def resolved(recipe: Recipe, otherwise: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe with absolute paths, wnids in place of a file of them, and the arguments of the network it starts from.

    Args:
        recipe: The recipe.
        otherwise: These arguments, if they are known already; the start need not be available then.

    Raises:
        ModelError, UnknownModelError: The start is not available, and its arguments are not known otherwise.
    """
    recipe = recipe.model_copy(deep=True)
    recipe.model.start, recipe.loss.teacher = _whole(recipe.model.start), _whole(recipe.loss.teacher)
    space = recipe.data.space
    if space is not None and not space.is_shipped:
        recipe.data.label_space = space.wnids  # the file may be deleted
    start = recipe.model.start
    if start is None or start.startswith(RANDOM) or not is_place(start):
        return recipe
    if otherwise is None:
        refuse_run("model.start", start)
        folder = building.configured_folder(start)
        otherwise = _arguments_in(building.read_config(folder)) if folder is not None else {}
    recipe.model.arguments = {**otherwise, **recipe.model.arguments}
    return recipe


def _whole(name: str | None) -> str | None:
    """A name of weights; a folder or file of this machine as a path that is valid from any working directory."""
    if name is None or name.startswith((RANDOM, building.HUB_PREFIX)) or not is_place(name):
        return name
    path = expanded(name.removeprefix(building.FOLDER_PREFIX), RecipeError).absolute()
    return str(path.parent.resolve() / path.name)  # a link into a cache may point to a different file name


def _arguments_in(config: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a configuration states for building its network, besides the architecture, as for timm.

    Rates of dropout and stochastic depth are a recipe's own to choose.
    """
    settings, arguments = building.settings_of(config), config.get("model_args")
    found: dict[str, Any] = {}
    if isinstance(settings, dict):
        if settings.get("fixed_input_size") and isinstance(settings.get("input_size"), list):
            found["img_size"] = settings["input_size"][-1]
        if settings.get("global_pool"):
            found["global_pool"] = settings["global_pool"]
    if isinstance(arguments, dict):
        found |= {name: value for name, value in arguments.items() if not (is_reserved(name) or is_drop_rate(name))}
    return found
