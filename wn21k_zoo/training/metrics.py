"""How good predictions are: per level of the hierarchy, on classes with images, and how far off mistakes are.

Each metric counts on the device of its inputs and waits for it only in ``compute``. Counts are integers, or sums of
them, and are added up over ranks exactly; with ``over_ranks`` False each rank keeps its own. Figures are NaN where
nothing was counted.

Shape suffixes: B batch, N classes, K levels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Self, TypedDict

import numpy as np
import torch
from torch import Tensor, nn

from wn21k_zoo.errors import InvalidArgumentError, NonFiniteError
from wn21k_zoo.training.levels import Levels, Order, check_tree
from wn21k_zoo.tree import SemanticTree

__all__ = [
    "BrokenRows",
    "Calibration",
    "ClassAccuracy",
    "Counts",
    "HierarchicalDistances",
    "LeafAccuracy",
    "SemanticAccuracy",
    "SemanticFigures",
]


def _share(part: float, whole: int) -> float:
    """A part of what was counted; NaN if nothing was."""
    return part / whole if whole else math.nan


_ROUNDING = 0.01  # how far sums of probabilities in half precision may be from 1


class Counts(nn.Module):
    """Integer counts that are added up over batches and ranks.

    Attributes:
        over_ranks: Whether to add up the counts of all ranks, where there are several; else each rank keeps its own.
    """

    counts: Tensor
    over_ranks: bool = True

    def __init__(self, *shape: int) -> None:
        super().__init__()
        # Not a buffer: in a network under DDP, rank 0's counts would replace all others' before each forward pass.
        self.counts = torch.zeros(shape, dtype=torch.int64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.counts = fn(self.counts)
        return self

    def reset(self) -> None:
        """Set all counts to 0."""
        self.counts = torch.zeros_like(self.counts)

    def _count(self, more: Tensor) -> None:
        self.counts = self.counts + more  # not in place: a program's processes may share this memory

    def _add(self, rows_b: Tensor, *columns_b: Tensor) -> None:
        """Add integers to each column, in the given rows, [B] each.

        They are first added up by themselves: on MPS, torch before 2.13 loses what is scattered into a column of
        another tensor (https://github.com/pytorch/pytorch/issues/163327), and adds in 32 bits, enough for a batch of
        two thousand images.
        """
        empty = torch.zeros(len(self.counts), dtype=torch.int64, device=self.counts.device)
        self._count(torch.stack([empty.scatter_add(0, rows_b, each.long()) for each in columns_b], 1))

    def _total(self) -> list[int]:
        total = self.counts
        dist = torch.distributed
        if self.over_ranks and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            total = total.clone()
            dist.all_reduce(total)
        return [int(value) for value in total.flatten().tolist()]


class BrokenRows(Counts):
    """The number of rows of logits that are not finite."""

    def __init__(self) -> None:
        super().__init__(2)

    @torch.no_grad()
    def update(self, logits_bn: Tensor) -> None:
        """Count a batch of logits [B, N]."""
        broken = ~logits_bn.isfinite().all(1)
        self._count(torch.stack([broken.sum(), torch.ones_like(broken, dtype=torch.int64).sum()]))

    def check(self) -> None:
        """Check that there were none, over all ranks.

        Raises:
            NonFiniteError: There were.
        """
        broken, images = self._total()
        if broken:
            raise _not_finite(f"{broken:,} of {images:,}")


def _is_broken(largest: Tensor) -> Tensor:
    """Whether a maximum, which is NaN if any of its numbers is, is NaN or inf."""
    return largest.isnan() | (largest == math.inf)


def _not_finite(images: str) -> NonFiniteError:
    return NonFiniteError(
        f"The logits of {images} images are NaN or infinite: the network diverged (a lower optimizer.lr may help), or "
        "its numbers are too large for fp16 (use bf16 or fp32)."
    )


def _out_of_range(images: int, num_classes: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"The targets or predictions of {images:,} images are not classes, which are 0 to {num_classes - 1}; do the "
        "data and the tree use the same label space?"
    )


def _check_classes(targets_b: Tensor, predictions_b: Tensor | None = None, counted_b: Tensor | None = None) -> None:
    for name, classes in (("targets", targets_b), ("predictions", predictions_b)):
        if classes is None:
            continue
        if not isinstance(classes, Tensor):
            raise InvalidArgumentError(f"{name} must be a tensor, not {type(classes).__name__}; use torch.as_tensor.")
        if classes.dtype != torch.int64 or classes.ndim != 1:
            advice = "; take them from logits by argmax(1)" if name == "predictions" and classes.ndim == 2 else ""
            if classes.ndim == 1 and not classes.is_floating_point():
                advice = f"; use {name}.long()"
            raise InvalidArgumentError(
                f"{name} must be class indices, int64 of the shape [batch]; they are {classes.dtype} of "
                f"{list(classes.shape)}{advice}."
            )
    for name, others in (("Predictions", predictions_b), ("counted_b", counted_b)):
        if others is not None and others.shape != targets_b.shape:
            raise InvalidArgumentError(
                f"{name} of shape {list(others.shape)} do not match targets of {list(targets_b.shape)}."
            )


class SemanticFigures(TypedDict):
    """What :class:`SemanticAccuracy` computes, in percent; ``levels`` is keyed by depth."""

    semantic_top1: float
    levels: dict[int, float]


class SemanticAccuracy(Counts):
    """Semantic top-1 as published: the share of valid (image, level) pairs that are right (arXiv 2104.10972).

    A level is valid for an image whose chain of ancestors reaches it; the prediction is the level's largest logit.

    Args:
        tree: The classes and their hierarchy.
        order: Order of the logits, see :class:`Levels`.

    Raises:
        InvalidArgumentError: The tree has no levels; from ``update``: shapes or targets that do not fit; on a GPU such
            targets raise from ``compute``.
        NonFiniteError: From ``compute``: a logit was NaN or inf; -inf is just the smallest value.
    """

    def __init__(self, tree: SemanticTree, order: Order = "published") -> None:
        levels = Levels(tree, order)
        levels.check_there_are_levels()
        super().__init__(len(levels.depths) + 1, 2)  # last row: images with broken logits, with impossible targets
        self.levels = levels

    @torch.no_grad()
    def update(self, logits_bn: Tensor, targets_b: Tensor) -> None:
        """Count a batch: logits [B, N] and indices in the label space [B] int64; an empty batch is ignored."""
        if not len(targets_b):
            return
        self.levels.check(logits_bn, targets_b)
        targets_b, there = self.levels.in_range(targets_b)  # else the GPU would be unusable afterwards
        ancestors = self.levels.ancestors[targets_b]
        best = [scores.max(1) for scores in self.levels.split(logits_bn)]
        predicted = torch.stack([each.indices for each in best], 1)
        largest = torch.stack([each.values for each in best], 1)
        broken = _is_broken(largest).any(1)  # -inf is allowed: all of a level are masked
        levels = torch.stack([(predicted == ancestors).sum(0), (ancestors >= 0).sum(0)], 1)
        self._count(torch.cat([levels, torch.stack([broken.sum(), (~there).sum()])[None]]))

    def compute(self) -> SemanticFigures:
        """Return percentages over all ranks: ``semantic_top1``, and ``levels`` by depth, for depths with images."""
        *total, broken, impossible = self._total()
        if impossible:
            raise _out_of_range(impossible, self.levels.num_classes)
        if broken:
            raise _not_finite(f"{broken:,}")
        right, valid = total[::2], total[1::2]
        per_level = {
            depth: 100 * hits / count
            for depth, hits, count in zip(self.levels.depths, right, valid, strict=True)
            if count
        }
        return {"semantic_top1": 100 * _share(sum(right), sum(valid)), "levels": per_level}


class LeafAccuracy(Counts):
    """Top-1 and top-5 among chosen classes, over the images of these classes.

    Args:
        classes: Indices in the label space, such as those of classes with images.

    Raises:
        InvalidArgumentError: No classes, or a negative index; from ``update``: scores that lack one of the classes.
        NonFiniteError: From ``compute``: a score was NaN or inf; -inf is just the smallest value.
    """

    classes: Tensor
    chosen: Tensor

    def __init__(self, classes: Iterable[int]) -> None:
        super().__init__(4)
        ordered = sorted({int(index) for index in classes})
        if not ordered or ordered[0] < 0:
            raise InvalidArgumentError("LeafAccuracy needs at least one class, and indices from 0.")
        self.register_buffer("classes", torch.tensor(ordered), persistent=False)
        self.register_buffer("chosen", torch.zeros(ordered[-1] + 1, dtype=torch.bool), persistent=False)
        self.chosen[self.classes] = True

    @torch.no_grad()
    def update(self, scores_bn: Tensor, targets_b: Tensor) -> Tensor:
        """Count scores [B, N] and targets [B] int64, both of the label space; returns predictions, [B] int64."""
        _check_classes(targets_b)
        if not isinstance(scores_bn, Tensor) or scores_bn.ndim != 2:
            shape = list(scores_bn.shape) if isinstance(scores_bn, Tensor) else type(scores_bn).__name__
            raise InvalidArgumentError(f"scores must be a tensor of the shape [batch, classes], not {shape}.")
        if scores_bn.shape[1] < len(self.chosen):
            raise InvalidArgumentError(
                f"The scores are of {scores_bn.shape[1]:,} classes, but a class that counts has the index "
                f"{len(self.chosen) - 1:,}."
            )
        chosen = scores_bn.index_select(1, self.classes)
        largest = chosen.topk(min(5, len(self.classes)), 1)
        best, broken = self.classes[largest.indices], _is_broken(largest.values[:, 0])
        hits = best == targets_b[:, None]
        self._count(torch.stack([hits[:, :1].sum(), hits.sum(), self.has(targets_b).sum(), broken.sum()]))
        return best[:, 0]

    def has(self, targets_b: Tensor) -> Tensor:
        """Whether each target is one of the classes, [B] bool."""
        last = len(self.chosen) - 1
        return self.chosen[targets_b.clamp(0, last)] & (targets_b >= 0) & (targets_b <= last)

    def compute(self) -> dict[str, float]:
        """Return percentages over all ranks, ``top1`` and ``top5``; and ``images``, how many the classes have."""
        first, any_of_five, count, broken = self._total()
        if broken:
            raise _not_finite(f"{broken:,}")
        return {"top1": 100 * _share(first, count), "top5": 100 * _share(any_of_five, count), "images": count}


class ClassAccuracy(Counts):
    """Top-1 of each class by itself, whatever its share of the images.

    Args:
        num_classes: Number of classes to count, from the first of the label space.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, 2)

    @torch.no_grad()
    def update(self, predictions_b: Tensor, targets_b: Tensor, counted_b: Tensor | None = None) -> None:
        """Count a batch of class indices, [B] int64 each, or only those where ``counted_b``, [B] bool, is true.

        Raises:
            InvalidArgumentError: As :meth:`HierarchicalDistances.update`.
        """
        _check_classes(targets_b, predictions_b, counted_b)
        rows = targets_b.clamp(0, len(self.counts) - 1)
        there = rows == targets_b  # other targets are not counted
        counted_b = there if counted_b is None else counted_b & there
        self._add(rows, counted_b, counted_b & (predictions_b == targets_b))

    def per_class(self) -> dict[int, tuple[int, int]]:
        """Map each class with counted images, by its index, to their number and that of right ones, over all ranks."""
        total = self._total()
        pairs = enumerate(zip(total[::2], total[1::2], strict=True))
        return {index: (images, right) for index, (images, right) in pairs if images}

    def compute(self) -> dict[str, float]:
        """Return ``balanced_top1``: the mean percentage of the classes with counted images, over all ranks."""
        shares = [right / images for images, right in self.per_class().values()]
        return {"balanced_top1": 100 * _share(sum(shares), len(shares))}


class HierarchicalDistances(Counts):
    """How far predicted classes are from true ones in the tree.

    The prediction of one softmax over all classes is its largest logit. Logits of a semantic softmax cannot be compared
    across levels: its predictions are what :meth:`wn21k_zoo.training.evaluation.Evaluation.update` returns. For classes
    of which none is above another, such as ImageNet-1K's, take the tree :meth:`SemanticTree.with_ancestors`, or else
    all mistakes are the same.

    - ``mean_lca_error``: by how many levels the lowest common ancestor of prediction and truth lies above the truth; a
      right prediction counts 0, one in another tree of the forest counts as if there were a root above all (the
      hierarchical distance of arXiv 1912.09393, as depth).
    - ``mean_lca_error_of_mistakes``: the same over wrong predictions only; 0 if there are none.
    - ``hierarchical_precision``, ``hierarchical_recall``: common ancestors, each class included in its own, as a share
      of the prediction's and of the truth's, micro-averaged (Kiritchenko et al. 2006).

    Args:
        tree: The classes and their hierarchy.

    Raises:
        InvalidArgumentError: ``tree`` is not one; from ``compute``: a prediction or target was not a class of it.
    """

    chains: Tensor
    depths: Tensor

    def __init__(self, tree: SemanticTree) -> None:
        super().__init__(7)
        check_tree(tree)
        self.register_buffer("chains", torch.from_numpy(tree.ancestor_table.copy()), persistent=False)
        self.register_buffer("depths", torch.from_numpy(tree.depths.astype(np.int64)), persistent=False)

    @torch.no_grad()
    def update(self, predictions_b: Tensor, targets_b: Tensor, counted_b: Tensor | None = None) -> None:
        """Count a batch of class indices, [B] int64 each, or only those where ``counted_b``, [B] bool, is true.

        Raises:
            InvalidArgumentError: They are not, or there are not as many predictions as targets.
        """
        _check_classes(targets_b, predictions_b, counted_b)
        counted = torch.ones_like(targets_b) if counted_b is None else counted_b.long()
        there = (torch.minimum(predictions_b, targets_b) >= 0) & (
            torch.maximum(predictions_b, targets_b) < len(self.depths)
        )
        predictions_b, targets_b = predictions_b.where(there, 0), targets_b.where(there, 0)
        ours, truth = self.chains[predictions_b], self.chains[targets_b]
        common = ((ours == truth) & (ours >= 0)).sum(1)
        lengths = self.depths[targets_b] + 1
        wrong = predictions_b != targets_b
        errors = (lengths - common) * wrong  # a descendant of the truth is 0 levels above it
        each = torch.stack(
            [torch.ones_like(common), wrong, errors, common, self.depths[predictions_b] + 1, lengths, ~there]
        )
        self._count((each * counted).sum(1))

    def compute(self) -> dict[str, float]:
        """Return errors in levels and the rest in percent, over all ranks."""
        images, mistakes, errors, common, predicted, truth, impossible = self._total()
        if impossible:
            raise _out_of_range(impossible, len(self.depths))
        return {
            "mean_lca_error": _share(errors, images),
            "mean_lca_error_of_mistakes": _share(errors, mistakes) if mistakes else _share(0, images),
            "hierarchical_precision": 100 * _share(common, predicted),
            "hierarchical_recall": 100 * _share(common, truth),
        }


class Calibration(Counts):
    """How well confidence matches the share of right predictions: the reliability diagram of arXiv 1706.04599.

    Args:
        bins: Number of equally wide bins of [0, 1].

    Raises:
        InvalidArgumentError: There are no bins; from ``compute``: a confidence was outside [0, 1].
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise InvalidArgumentError(f"bins is {bins}; it must be at least 1.")
        super().__init__(bins + 1, 3)  # last row: confidences outside [0, 1]
        self.bins = bins

    @torch.no_grad()
    def update(self, confidence_b: Tensor, right_b: Tensor, counted_b: Tensor | None = None) -> None:
        """Count a batch: confidences in [0, 1] and whether predictions were right, [B] each.

        With ``counted_b``, [B] bool, only those where it is true are counted.
        """
        confidence_b = confidence_b.float()
        right_b = right_b.bool()
        counted_b = torch.ones_like(right_b) if counted_b is None else counted_b
        there = (confidence_b > -_ROUNDING) & (confidence_b < 1 + _ROUNDING)  # not NaN either
        confidence_b = confidence_b.where(there, 0).clamp(0, 1)
        at = (confidence_b * self.bins).long().clamp_(0, self.bins - 1).where(there, self.bins)
        millionths = (confidence_b * 1e6).round().long()  # whole, so that sums are exact in any order
        self._add(at, counted_b, counted_b & right_b, millionths * counted_b)

    def compute(self) -> dict[str, float | list[dict[str, float]]]:
        """Return the expected ``calibration_error`` in percent, and ``reliability``: figures per bin with images."""
        *total, impossible, _, _ = self._total()
        if impossible:
            raise InvalidArgumentError(f"The confidences of {impossible:,} images are not in [0, 1].")
        rows, images = [], sum(total[::3])
        error = _share(0, images)
        for number in range(self.bins):
            count, right, millionths = total[3 * number : 3 * number + 3]
            if not count:
                continue
            accuracy, confidence = 100 * right / count, 100 * millionths / 1e6 / count
            error += count / images * abs(accuracy - confidence)
            rows.append({"images": count, "confidence": confidence, "accuracy": accuracy})
        return {"calibration_error": error, "reliability": rows}
