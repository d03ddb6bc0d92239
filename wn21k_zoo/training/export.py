"""Export a run to a folder with a checkpoint, as ``wn21k export`` writes it, and the draft of a record.

The folder loads in timm, in transformers and here: ``wn21k_zoo.predict("photo.jpg", model=FOLDER)``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wn21k_zoo import convert, registry, saving
from wn21k_zoo.building import HUB_PREFIX, pretrained_config
from wn21k_zoo.checkpoints import Checkpoint, Metric
from wn21k_zoo.errors import InvalidArgumentError, RunError, first_line
from wn21k_zoo.labels import ClassNames
from wn21k_zoo.training.heads import reorder_head
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.recipe import NAME, RANDOM, Recipe, is_drop_rate
from wn21k_zoo.training.state import RunFolder, read_checkpoint
from wn21k_zoo.training.weights import checkpoint_file, is_place
from wn21k_zoo.tree import SemanticTree

__all__ = ["TRAINED_ON", "Trained", "export_run", "load_checkpoint", "load_run"]

_MICRO = "micro-average over all valid (image, level) pairs"
TRAINED_ON = "trained_on"
"""Key in config.json of an exported folder for the sketch of the images that its network was trained on."""


class Trained:
    """The network of a run, on the CPU, with its head in the order of the label space.

    Attributes:
        recipe: The run's recipe.
        module: The network; the moving average if the run keeps one.
        space: Its classes, None if they are not synsets.
        class_names: A wnid, or a folder's name, per output.
        run: Name of the run's folder.
        step: Step of the checkpoint.
        trained_on: :attr:`FolderDataset.sketch` of the training images if they are a folder; else empty.
        figures: Figures of the evaluation at that step; empty if there was none.
    """

    def __init__(self, folder: RunFolder, state: dict[str, Any]) -> None:
        self.recipe: Recipe = folder.recipe()
        self.run = folder.path.name
        self.step: int = state["step"]
        self.trained_on: str = str(folder.data().get("sketch") or "")
        self.figures: dict[str, Any] = state["figures"] if state["figures"].get("step") == self.step else {}
        self.space, self.class_names = folder.classes()
        self.module = self._build(state)

    def _build(self, state: dict[str, Any]) -> nn.Module:
        model = self.recipe.model
        module = convert.build(model.architecture, num_classes=len(self.class_names), **model.arguments)
        weights = state["model"]
        if state["average"] is not None:
            prefix = "module.module."  # of ModelEmaV3, and of Normalized within it
            average = state["average"]
            weights = {key: average[f"{prefix}{key}"] for key in weights}
        module.load_state_dict(weights)
        if self.space is not None:
            reorder_head(module, Levels(SemanticTree.from_label_space(self.space), "level").positions)
        return module.eval()

    def checkpoint(self, name: str | None = None) -> Checkpoint:
        """Draft a record from what the run knows about itself.

        Raises:
            InvalidArgumentError: The name is that of published weights, or not a valid one.
        """
        recipe = self.recipe
        if name is None:  # a published checkpoint's recipe has its name, but other weights
            run = re.sub(r"[^A-Za-z0-9._-]+", "-", self.run)
            name = f"{recipe.model.architecture}.{run}" if registry.is_known(recipe.name) else recipe.name
        elif not NAME.fullmatch(name):
            raise InvalidArgumentError(f"{name!r} is not a name for a record; use letters, digits, dots, - and _.")
        elif registry.is_known(name):
            raise InvalidArgumentError(f"{name} is the name of published weights; choose another name (--name).")
        metrics = tuple(
            Metric(
                name=label,
                value=round(self.figures[key], 2),
                dataset=f"{self.figures[images]:,} validation images",
                protocol=protocol,
                measured_by="wn21k_zoo.training",
            )
            for key, label, images, protocol in (
                ("raw_semantic_top1", "semantic top-1", "images", f"{_MICRO}, by the highest logit (as published)"),
                ("semantic_top1", "semantic top-1", "images", f"{_MICRO}, by confidence"),
                ("top1", "top-1", "leaf_images", "among the leaves with images, by confidence"),
            )
            # For a softmax per level both are the same.
            if self.figures.get(key) is not None and (key, recipe.loss.head) != ("semantic_top1", "semantic_softmax")
        )
        size = recipe.data.size
        return Checkpoint(
            name=name,
            architecture=recipe.model.architecture,
            label_space=self.space.name if self.space else "own",
            head=recipe.loss.head,
            input_size=(3, size, size),
            mean=recipe.model.mean,
            std=recipe.model.std,
            interpolation="bilinear",
            resize="squash" if recipe.data.crop_pct is None else "crop",
            crop_pct=recipe.data.crop_pct or 1.0,
            sources=(),
            metrics=metrics,
        )


def load_run(run: str | os.PathLike[str], which: str = "best") -> Trained:
    """Load the network of a run.

    Args:
        run: Its output folder.
        which: ``best`` (the highest semantic top-1, or top-1) or ``last``.

    Raises:
        RunError: There is no run or no such checkpoint, or it is damaged.
        InvalidArgumentError: ``which`` is something else.
    """
    folder = RunFolder(Path(run))
    folder.recipe()
    if which not in ("best", "last"):
        raise InvalidArgumentError(f"which is {which!r}; it can be best or last.")
    if which == "best" and folder.best.is_file():
        try:
            state: dict[str, Any] | None = read_checkpoint(folder.best)
        except RunError as error:
            raise RunError(f"{error} The last one may be intact: use that (which='last', --checkpoint last).") from None
    else:
        state = folder.newest()
    if state is None:
        raise RunError(f"{folder.path} has no checkpoint yet.")
    return _trained(folder, state)


def load_checkpoint(file: str | os.PathLike[str]) -> Trained:
    """Load the network of one checkpoint of a run, ``RUN/checkpoints/step-00001234.pt``.

    Raises:
        RunError: There is no such file, it is damaged, or it is not in a run's folder.
    """
    path = checkpoint_file(file)
    folder = RunFolder(path.parent.parent)
    folder.recipe()
    return _trained(folder, read_checkpoint(path))


def _trained(folder: RunFolder, state: dict[str, Any]) -> Trained:
    try:
        return Trained(folder, state)
    except RunError:
        raise
    except (KeyError, RuntimeError, TypeError) as error:
        raise RunError(f"The checkpoint of {folder.path} does not fit its recipe: {first_line(error)}") from error


def export_run(
    run: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    which: str = "best",
    name: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write a run's network as ``wn21k export`` writes a record's, and ``record.py``, the draft of a record.

    Args:
        run: Output folder of the run.
        folder: Folder to write.
        which: ``best`` or ``last``.
        name: Name of the record; default: the recipe's or, if that is the name of published weights, the architecture's
            with that of the run's folder.
        dtype: Dtype of the weights; default: unchanged.
        force: Replace the folder of an earlier export.

    Returns:
        The folder.

    Raises:
        RunError: There is no run, or no checkpoint.
        InvalidArgumentError, PublishError: The folder cannot be written.
    """
    target = saving.check_target(folder, dtype, force)
    trained = load_run(run, which)
    checkpoint = trained.checkpoint(name)
    classes = trained.space or ClassNames(trained.class_names)
    settings = pretrained_config(checkpoint, len(classes))
    config = saving.folder_config(checkpoint.architecture, settings, trained.module, classes, checkpoint.head)
    labels = saving.folder_labels(trained.space, checkpoint.head) if trained.space is not None else None
    arguments = trained.recipe.model.arguments.items()
    if of_network := {name: value for name, value in arguments if not is_drop_rate(name)}:
        config["model_args"] = of_network
    if trained.trained_on:
        config[TRAINED_ON] = trained.trained_on
    card = _card(checkpoint, trained)
    return saving.write_export(target, trained.module, config, labels, card, dtype, _draft(checkpoint))


def _draft(checkpoint: Checkpoint) -> str:
    fields = {
        field.name: value
        for field in dataclasses.fields(checkpoint)
        if (value := getattr(checkpoint, field.name)) != field.default
    }
    imported = "Checkpoint, Metric" if checkpoint.metrics else "Checkpoint"
    return "\n".join(
        [
            '"""Draft of a record for wn21k_zoo/checkpoints.py; sources and licence are for the publisher to add."""',
            "",
            f"from wn21k_zoo.checkpoints import {imported}",
            "",
            "checkpoint = Checkpoint(",
            *(f"    {name}={value!r}," for name, value in fields.items()),
            ")",
            "",
        ]
    )


def _shared(name: str | None) -> str | None:
    """Return a name of weights fit for publication: only the last part of a path on this machine."""
    if name is None:
        return None
    plain = name.removeprefix(RANDOM)
    is_here = is_place(plain) and not plain.startswith(HUB_PREFIX)
    return name.removesuffix(plain) + (Path(plain).name if is_here else plain)


def _card(checkpoint: Checkpoint, trained: Trained) -> str:
    recipe = trained.recipe.model_copy(deep=True)
    if isinstance(recipe.data.label_space, tuple):  # maybe thousands of lines
        recipe.data.label_space = f"{len(recipe.data.label_space):,} wnids, those of {saving.LABELS_FILE}"
    recipe.model.start, recipe.loss.teacher = _shared(recipe.model.start), _shared(recipe.loss.teacher)
    return saving.own_card(
        checkpoint.name,
        checkpoint.architecture,
        len(trained.class_names),
        checkpoint.head,
        f", trained with wn21k_zoo ({torch.__version__.partition('+')[0]} of torch) for {trained.step:,} steps",
        [(metric.name, metric.value, metric.dataset, metric.protocol) for metric in checkpoint.metrics],
        ("## Recipe", "", "```json", recipe.to_json().strip(), "```"),
    )
