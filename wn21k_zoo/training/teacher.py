"""The network whose predictions are distilled: any model of the zoo, also one with other classes.

Shape suffixes: B batch, N classes of the student.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from wn21k_zoo import convert
from wn21k_zoo.checkpoints import Checkpoint, Head
from wn21k_zoo.errors import InvalidArgumentError, RecipeError, UnresolvedLabelSpaceError
from wn21k_zoo.hierarchy import Decoder, Hierarchy
from wn21k_zoo.labels import ClassNames, LabelSpace
from wn21k_zoo.models import Classes, load_model
from wn21k_zoo.training.export import load_checkpoint
from wn21k_zoo.training.folder import composed
from wn21k_zoo.training.heads import reorder_head
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.network import Normalized
from wn21k_zoo.training.recipe import RANDOM, Model, Recipe, sized
from wn21k_zoo.training.weights import is_place, not_of_synsets, refuse_run, teacher_record, warn_if_missing
from wn21k_zoo.tree import SemanticTree

__all__ = ["Translated", "build_teacher", "check_teacher", "digest_of"]

_SMALLEST = 1e-30  # a probability with a finite logarithm


class Translated(nn.Module):
    """A network's predictions as logits of other classes or of another kind of head, in level order.

    A head that is read through the tree (:class:`wn21k_zoo.hierarchy.Decoder`) gives each node of the student's tree a
    probability; a semantic softmax over other classes gives one to the classes that both have. For a student with a
    semantic softmax, what a level lacks to 1, because the teacher says that the image has nothing there or does not
    know its classes, is spread evenly over the level: the loss then gives it little weight. For a student with one
    softmax over all classes, the same is done with the mass of each class alone, without its descendants
    (:meth:`wn21k_zoo.hierarchy.Decoder.own_mass`).

    Args:
        module: The teacher, images to logits in its own label space.
        space: Its classes.
        head: Kind of its head.
        tree: The student's classes.
        student: Kind of the student's head, ``semantic_softmax`` or ``softmax``.
        device: Of the logits.

    Attributes:
        known: The number of the student's classes that it can predict.

    Raises:
        RecipeError: It says nothing about the student's classes.
    """

    def __init__(
        self,
        module: nn.Module,
        space: LabelSpace,
        head: Head,
        tree: SemanticTree,
        student: Head,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.module, self._per_level = module, student == "semantic_softmax"
        hierarchy = Hierarchy(tree)
        self._slices = hierarchy.depth_slices if self._per_level else [slice(0, len(tree))]
        self._shared: Tensor | None = None
        own = SemanticTree.from_label_space(space)
        if not self._per_level:
            self._own = Decoder(own, space, head, device)
            self._decoder = Decoder(tree, space, "softmax", device)
            by_wnid = self._own.hierarchy.position[self._decoder.output_order]
            self._by_wnid = torch.from_numpy(by_wnid).to(device)
        elif head == "semantic_softmax":
            self._decoder = Decoder(own, space, head, device)
            theirs = self._decoder.hierarchy.position
            at = [theirs[own.label_space.index[wnid]] if wnid in own else -1 for wnid in tree.wnids]
            self._shared = torch.from_numpy(np.array(at)[hierarchy.order]).to(device)
        else:
            self._decoder = Decoder(tree, space, head, device)
        depths = torch.tensor(own.depths, dtype=torch.float32, device=device)
        self.known = int((self._probability(-depths[None]) > 0).sum())  # parents above children, as sigmoids need it
        if not self.known:
            raise RecipeError(f"The teacher knows none of the classes of {tree.name}; name another loss.teacher.")

    def forward(self, images: Tensor) -> Tensor:
        """Pixels in [0, 1], [B, 3, height, width], to logarithms of probabilities [B, N] in float32."""
        probability_bn = self._probability(self.module(images))
        parts = []
        for where in self._slices:
            p = probability_bn[:, where]
            missing = (1 - p.sum(1, keepdim=True)).clamp_min(0)
            parts.append(p + missing / p.shape[1])
        return torch.cat(parts, 1).clamp_min(_SMALLEST).log()

    def _probability(self, logits_bk: Tensor) -> Tensor:
        if not self._per_level:
            return self._decoder.assigned(self._own.own_mass(logits_bk).index_select(1, self._by_wnid))
        probability = self._decoder(logits_bk).probability
        if self._shared is None:
            return probability
        return probability.index_select(1, self._shared.clamp_min(0)).where(self._shared >= 0, 0)


def build_teacher(
    recipe: Recipe, classes: Classes, levels: Levels | None, device: torch.device | str = "cpu"
) -> tuple[nn.Module, str, str]:
    """Build the frozen teacher, with its own normalisation; also return a line about it, and a digest.

    The teacher takes pixels in [0, 1] and gives logits of the student's classes: in level order, or in that of their
    names if they are not synsets; the teacher must then be a softmax over the same names. The line is empty if it has
    the same classes with the same kind of head. The digest covers everything that determines its outputs.

    Raises:
        RecipeError: It says nothing about the student's classes, or is the folder of a run, or ``loss.teacher_head`` is
            missing or must be left out.
        ModelError, UnknownModelError, RunError: It cannot be obtained.
    """
    name, head = cast(str, recipe.loss.teacher), recipe.loss.head
    theirs, their_head = classes, head
    if name.startswith(RANDOM):
        module, mean, std = _random_teacher(recipe, name.removeprefix(RANDOM), classes)
    else:
        module, theirs, their_head, mean, std = _trained_teacher(recipe, name)
    about = ""
    facts = theirs.digest if isinstance(theirs, LabelSpace) else theirs.names
    digest = digest_of(module, [*map(float, mean)], [*map(float, std)], their_head, facts)
    teacher: nn.Module = Normalized(module, mean, std)
    if levels is None or not isinstance(classes, LabelSpace):
        names = [*map(composed, theirs)]
        if their_head != "softmax" or sorted(names) != sorted(classes):
            raise _of_other_names(name)
        if names != [*classes]:
            at = {each: index for index, each in enumerate(names)}
            reorder_head(module, torch.tensor([at[each] for each in classes]))
    elif not isinstance(theirs, LabelSpace):
        raise not_of_synsets(name)
    elif theirs.wnids == classes.wnids and their_head == head:
        reorder_head(module, levels.columns)
    else:
        teacher = translated = Translated(teacher, theirs, their_head, levels.tree, head, device)
        about = (
            f"the teacher {name} is a {their_head} over {theirs.name}; it knows {translated.known:,} of the "
            f"{len(classes):,} classes"
        )
    return teacher.to(device).eval().requires_grad_(False), about, digest


def check_teacher(recipe: Recipe) -> None:
    """Check that a teacher that is not a place is known, before weights are fetched.

    Raises:
        UnknownModelError, RecipeError: It is not, or its classes are not.
    """
    name = (recipe.loss.teacher or "").removeprefix(RANDOM)
    if name and not is_place(name):
        teacher_record(name)


def _of_other_names(teacher: str) -> RecipeError:
    return RecipeError(
        f"loss.teacher {teacher} is not a softmax over the classes of the data, as a teacher of classes that are not "
        "synsets must be; name another one, or name the folders by wnids."
    )


def _trained_teacher(recipe: Recipe, name: str) -> tuple[nn.Module, Classes, Head, Any, Any]:
    """A teacher with its classes, kind of head, mean and standard deviation."""
    if name.endswith(".pt"):
        if recipe.loss.teacher_head is not None:
            raise RecipeError(f"The run of {name} states its head; leave out loss.teacher_head.")
        trained = load_checkpoint(name)
        classes, own = trained.space or ClassNames(trained.class_names), trained.recipe
        return trained.module, classes, own.loss.head, own.model.mean, own.model.std
    refuse_run("loss.teacher", name)
    try:
        loaded = load_model(name, head=recipe.loss.teacher_head)
    except UnresolvedLabelSpaceError:
        raise not_of_synsets(name) from None
    except InvalidArgumentError as error:
        raise RecipeError(f"loss.teacher_head: {error}") from None
    config = cast(Mapping[str, Any], loaded.data_config)  # always known for a model given by name
    return loaded.module, loaded.label_space, loaded.head, config["mean"], config["std"]


def digest_of(module: nn.Module, *facts: Any) -> str:
    """The sha256 of all weights with their names, and of other facts about a network."""
    digest = hashlib.sha256(repr(facts).encode())
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _random_teacher(recipe: Recipe, name: str, classes: Classes) -> tuple[nn.Module, Any, Any]:
    """A record's network with random weights, mean and deviation; for a file, folder or repository the student's."""
    torch.manual_seed(recipe.run.seed + 1)  # the same on resume, and different from the student
    like: Model | Checkpoint = recipe.model
    if is_place(name):
        warn_if_missing("loss.teacher", name)
    else:
        like = teacher_record(name)
        if recipe.loss.teacher_head is not None:
            raise RecipeError(f"loss.teacher_head: {name} states its own head; leave it out.")
        if not isinstance(classes, LabelSpace):
            raise _of_other_names(name)
    arguments = sized(like.architecture, {}, recipe.data.size) or {}
    return convert.build(like.architecture, num_classes=len(classes), **arguments), like.mean, like.std
