"""Evaluation of the predictions of any kind of head, by every figure that the project reports.

Shape suffixes: B batch, N classes.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wn21k_zoo.checkpoints import Head, check_head
from wn21k_zoo.errors import InvalidArgumentError
from wn21k_zoo.hierarchy import Decoder
from wn21k_zoo.training.dataset import ImageDataset, images_per_class
from wn21k_zoo.training.levels import Levels, Order
from wn21k_zoo.training.metrics import (
    BrokenRows,
    Calibration,
    ClassAccuracy,
    Counts,
    HierarchicalDistances,
    LeafAccuracy,
    SemanticAccuracy,
)
from wn21k_zoo.tree import SemanticTree

__all__ = ["Evaluation", "classes_with_images"]


class Evaluation(nn.Module):
    """Counts batches of logits.

    A node's score is what :class:`wn21k_zoo.hierarchy.Decoder` gives for the kind of head: for a semantic softmax its
    probability within its level, for a softmax the sum over its subtree. Semantic top-1 uses these scores; the
    published protocol takes the largest raw logit of each level, which is the same for a semantic softmax.

    Leaves are the classes with images that have no descendant with images: since no class is more confident than its
    ancestors, only leaves compete for the highest confidence. If no class with images is above another, all are leaves.
    Among leaves as confident as a common ancestor, the one with the highest probability within its level is chosen.

    Hierarchical distances use the tree of the classes or, if that has only one level or one class per level, or with
    ``with_ancestors``, the tree of the classes and all synsets above them in WordNet, in which models over different
    classes can be compared.

    Attributes:
        hierarchy: Name of the tree used for the distances, None for classes that are not synsets.

    Args:
        tree: The classes and their hierarchy; None for a plain softmax over custom classes.
        head: The kind of head.
        classes: The classes with images.
        order: Order of the logits.
        device: Where the logits are. On MPS, which lacks float64, they are counted on the CPU.
        over_ranks: Whether figures cover the batches of all ranks, each of which computes them, or only its own.
        num_classes: Number of outputs of a head without a tree; default: that of the classes with images.
        with_ancestors: Whether hierarchical distances use the tree with all synsets above the classes in any case.
    """

    def __init__(
        self,
        tree: SemanticTree | None,
        head: Head,
        classes: Sequence[int],
        order: Order = "published",
        device: torch.device | str = "cpu",
        over_ranks: bool = True,
        num_classes: int | None = None,
        with_ancestors: bool = False,
    ) -> None:
        super().__init__()
        check_head(head)
        if torch.device(device).type == "mps":
            device = "cpu"
        num_classes = len(tree) if tree is not None else num_classes
        self._widths = (
            (max(classes, default=-1) + 1, sys.maxsize) if num_classes is None else (num_classes, num_classes)
        )
        self._levels = Levels(tree, order) if tree is not None and order == "level" else None
        self.distances: HierarchicalDistances | None = None
        self.hierarchy: str | None = None
        if tree is not None:
            has_levels = bool(tree.depths.max() and tree.levels)
            spread = tree if has_levels and not with_ancestors else tree.with_ancestors()
            self.distances, self.hierarchy = HierarchicalDistances(spread), spread.name
            if not has_levels:  # no class is above another, or none beside another
                tree = None
        self.leaf, self.raw = LeafAccuracy(_leaves(tree, classes)), LeafAccuracy(classes)
        self.among_all: LeafAccuracy | None = None  # else no class competes but those with images
        if num_classes is not None and num_classes > len(self.raw.classes):
            self.among_all = LeafAccuracy(range(num_classes))
        self.classes, self.calibration = ClassAccuracy(max(classes) + 1), Calibration()
        self.broken = BrokenRows()
        self.semantic = SemanticAccuracy(tree, "level") if tree is not None else None
        self.raw_semantic = SemanticAccuracy(tree) if tree is not None and head != "semantic_softmax" else None
        self._decoder = Decoder(tree, tree.label_space, head, device) if tree is not None else None
        self._head = head
        for each in self.modules():
            if isinstance(each, Counts):
                each.over_ranks = over_ranks
        self.to(device)

    @torch.no_grad()
    def update(self, logits_bn: Tensor, targets_b: Tensor) -> tuple[Tensor, Tensor]:
        """Count a batch: logits [B, N] and indices in the label space [B] int64; an empty batch is ignored.

        Targets that are not classes are errors if the classes have levels (on a GPU when figures are computed), and
        else not counted.

        Returns:
            The predicted leaf of each image, [B] int64, and its confidence, [B].

        Raises:
            InvalidArgumentError: They are not tensors of these shapes and dtypes, or targets are not classes.
        """
        if not isinstance(logits_bn, Tensor) or not isinstance(targets_b, Tensor):
            raise InvalidArgumentError("Logits and targets must be tensors.")
        if not targets_b.numel() and not logits_bn.numel():
            return targets_b, logits_bn.new_zeros(0)
        if logits_bn.device.type == "mps":
            logits_bn, targets_b = logits_bn.cpu(), targets_b.cpu()
        self._check(logits_bn, targets_b)
        logits_bn = logits_bn.float()
        if self._levels is not None:
            logits_bn = logits_bn.index_select(1, self._levels.positions)
        self.raw.update(logits_bn, targets_b)  # first, as it checks the targets
        self.broken.update(logits_bn)
        if self.among_all is not None:
            self.among_all.update(logits_bn, targets_b)
        if self._decoder is None or self.semantic is None:
            order = logits_bn
            confidence = logits_bn.sigmoid() if self._head == "sigmoid" else logits_bn.softmax(1)
        else:
            if self.raw_semantic is not None:
                self.raw_semantic.update(logits_bn, targets_b)
            scores = self._decoder(logits_bn)
            self.semantic.update(scores.rank, targets_b)
            confidence = scores.confidence.index_select(1, self.semantic.levels.positions)
            order = scores.rank.index_select(1, self.semantic.levels.positions)
            if self._head == "semantic_softmax":  # capped by less confident ancestors, so ties occur
                probability = scores.probability.index_select(1, self.semantic.levels.positions)
                order = confidence.double() * (1 + 1e-9 * probability.double())  # less than float32 can tell apart
        predictions = self.leaf.update(order, targets_b)
        sure, counted = confidence.gather(1, predictions[:, None])[:, 0], self.leaf.has(targets_b)
        if self.distances is not None:
            self.distances.update(predictions, targets_b, counted)
        self.classes.update(predictions, targets_b, counted)
        self.calibration.update(sure, predictions == targets_b, counted)
        return predictions, sure

    def _check(self, logits_bn: Tensor, targets_b: Tensor) -> None:
        """Check a batch before any of it is counted."""
        if self.semantic is not None:
            self.semantic.levels.check(logits_bn, targets_b)
        if not logits_bn.is_floating_point():
            raise InvalidArgumentError(f"Logits must have a floating-point dtype, not {logits_bn.dtype}.")
        few, many = self._widths
        if logits_bn.ndim != 2 or targets_b.shape != logits_bn.shape[:1] or not few <= logits_bn.shape[1] <= many:
            raise InvalidArgumentError(
                f"Logits [B, {few}] and targets [B] are needed; they have the shapes {list(logits_bn.shape)} and "
                f"{list(targets_b.shape)}."
            )

    def reset(self) -> None:
        """Set all counts to 0."""
        for each in self.modules():
            if isinstance(each, Counts):
                each.reset()

    def compute(self) -> dict[str, Any]:
        """Return all figures, shares in percent; waits for all ranks if figures cover them.

        ``top1`` and ``top5`` cover the images of leaves, counted by ``leaf_images``, and rank leaves by confidence;
        so do calibration, the hierarchical figures and ``balanced_top1``, the mean top-1 of all classes.
        ``raw_top1`` uses the highest logit among all classes with images; ``top1_among_all``, which a semantic softmax
        lacks, that among all classes, the usual top-1; ``raw_semantic_top1`` the highest logit of each level, the
        published protocol. A confidence is what the model gives among all its classes, even if few of them have images.
        ``hierarchy`` is the attribute. A figure for which nothing was counted, as of damaged images alone, is None.

        Raises:
            NonFiniteError: Logits were not finite.
            InvalidArgumentError: Targets on a GPU were not classes.
        """
        self.broken.check()
        figures: dict[str, Any] = {"hierarchy": self.hierarchy}
        if self.semantic is not None:
            figures |= self.semantic.compute()
            figures["raw_semantic_top1"] = (self.raw_semantic or self.semantic).compute()["semantic_top1"]
        leaf, raw = self.leaf.compute(), self.raw.compute()
        figures |= {"top1": leaf["top1"], "top5": leaf["top5"], **self.classes.compute(), "raw_top1": raw["top1"]}
        if self._head != "semantic_softmax":  # whose logits of different levels cannot be compared
            figures["top1_among_all"] = (self.among_all or self.raw).compute()["top1"]
        if self.distances is not None:
            figures |= self.distances.compute()
        figures |= self.calibration.compute()
        figures = {name: None if value != value else value for name, value in figures.items()}  # NaN is no JSON
        counts = {"images": raw["images"], "leaf_images": leaf["images"]}
        return figures | counts | {"classes_with_images": len(self.raw.classes), "leaves": len(self.leaf.classes)}


def _leaves(tree: SemanticTree | None, classes: Sequence[int]) -> list[int]:
    """Return the classes that are not an ancestor of another one of them."""
    if tree is None:
        return list(classes)
    above = {ancestor for index in classes for ancestor in tree.chain(index)[1:]}
    return [index for index in classes if index not in above]


def classes_with_images(dataset: ImageDataset) -> list[int]:
    """Return the indices of the classes that have at least one image."""
    return list(map(int, np.flatnonzero(images_per_class(dataset))))
