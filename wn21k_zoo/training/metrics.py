"""How good predictions are: per level of the hierarchy, on the imaged classes, and how far off mistakes are.

Each metric counts on the device of what it is given and waits for it only in ``compute``. Counts are whole numbers, or
sums of them, and are added up over ranks exactly; with ``over_ranks`` False each rank's are its own.

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


_ROUNDING = 0.01  # by so much sums of probabilities in half precision may miss 1


class Counts(nn.Module):
    """Whole numbers that are added up over batches and ranks.

    Attributes:
        over_ranks: Whether those of all ranks count, where there are several; else each rank's are its own.
    """

    counts: Tensor
    over_ranks: bool = True

    def __init__(self, *shape: int) -> None:
        super().__init__()
        # No buffer: in a network under DDP rank 0's counts would take the place of all others' before each forward.
        self.counts = torch.zeros(shape, dtype=torch.int64)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.counts = fn(self.counts)
        return self

    def reset(self) -> None:
        """Forget all."""
        self.counts = torch.zeros_like(self.counts)

    def _count(self, more: Tensor) -> None:
        self.counts = self.counts + more  # not in place: a program's processes may share what they were given

    def _add(self, rows_b: Tensor, *columns_b: Tensor) -> None:
        """Add to each column, in the rows that are named, whole numbers, [B] each.

        First among themselves: torch before 2.13 loses on MPS what is scattered into a column of another tensor
        (https://github.com/pytorch/pytorch/issues/163327), and adds up there in 32 bits, enough for a batch of two
        thousand images.
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
    """How many rows of logits are not finite."""

    def __init__(self) -> None:
        super().__init__(2)

    @torch.no_grad()
    def update(self, logits_bn: Tensor) -> None:
        """Count a batch of logits [B, N]."""
        broken = ~logits_bn.isfinite().all(1)
        self._count(torch.stack([broken.sum(), torch.ones_like(broken, dtype=torch.int64).sum()]))

    def check(self) -> None:
        """See that there were none, over all ranks.

        Raises:
            NonFiniteError: There were.
        """
        broken, images = self._total()
        if broken:
            raise _not_finite(f"{broken:,} of {images:,}")


def _is_broken(largest: Tensor) -> Tensor:
    """Whether the largest of some numbers, which is NaN where one of them is, is NaN or inf."""
    return largest.isnan() | (largest == math.inf)


def _not_finite(images: str) -> NonFiniteError:
    return NonFiniteError(
        f"The logits of {images} images are NaN or infinite: the network diverged (a lower optimizer.lr may help), or "
        "is too wide for fp16 (take bf16 or fp32)."
    )


def _out_of_range(images: int, num_classes: int) -> InvalidArgumentError:
    return InvalidArgumentError(
        f"The targets or predictions of {images:,} images are no classes, which are 0 to {num_classes - 1}; do the "
        "data and the tree speak the same label space?"
    )


class SemanticFigures(TypedDict):
    """What :class:`SemanticAccuracy` computes, in percent; ``levels`` is by depth."""

    semantic_top1: float
    levels: dict[int, float]


class SemanticAccuracy(Counts):
    """Semantic top-1 as published: the share of valid (image, level) pairs that are right (arXiv 2104.10972).

    A level is valid for an image whose chain of ancestors reaches it; the prediction is the level's largest logit.

    Args:
        tree: The classes and their hierarchy.
        order: In which order logits come, see :class:`Levels`.

    Raises:
        InvalidArgumentError: From ``update``: shapes or targets that do not fit; of a GPU such targets from
            ``compute``.
        NonFiniteError: From ``compute``: a logit was NaN or inf; -inf is smaller than all others.
    """

    def __init__(self, tree: SemanticTree, order: Order = "published") -> None:
        levels = Levels(tree, order)
        super().__init__(len(levels.depths) + 1, 2)  # the last: images with broken logits, and with impossible targets
        self.levels = levels

    @torch.no_grad()
    def update(self, logits_bn: Tensor, targets_b: Tensor) -> None:
        """Count a batch: logits [B, N] and indices in the label space [B] int64; an empty batch is none."""
        if not len(targets_b):
            return
        self.levels.check(logits_bn, targets_b)
        there = (targets_b >= 0) & (targets_b < self.levels.num_classes)  # else a GPU would be of no use afterwards
        ancestors = self.levels.ancestors[targets_b.where(there, 0)]
        best = [scores.max(1) for scores in self.levels.split(logits_bn)]
        predicted = torch.stack([each.indices for each in best], 1)
        largest = torch.stack([each.values for each in best], 1)
        broken = _is_broken(largest).any(1)  # -inf: all of a level are masked
        levels = torch.stack([(predicted == ancestors).sum(0), (ancestors >= 0).sum(0)], 1)
        self._count(torch.cat([levels, torch.stack([broken.sum(), (~there).sum()])[None]]))

    def compute(self) -> SemanticFigures:
        """Percentages over all ranks: ``semantic_top1``, and ``levels``: depth -> percent where something was valid."""
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
        return {"semantic_top1": 100 * sum(right) / max(1, sum(valid)), "levels": per_level}


class LeafAccuracy(Counts):
    """Top-1 and top-5 among a choice of classes, over the images of these classes.

    Args:
        classes: Indices in the label space, such as those that have images.

    Raises:
        InvalidArgumentError: No classes, or a negative one; from ``update``: scores that lack one.
        NonFiniteError: From ``compute``: a score was NaN or inf; -inf is smaller than all others.
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
        """Count a batch: scores [B, N] and targets [B] int64, both of the label space; gives predictions, [B] int64."""
        if scores_bn.shape[1] < len(self.chosen):
            raise InvalidArgumentError(
                f"The scores are of {scores_bn.shape[1]:,} classes, and one that counts has the index "
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
        """Percentages over all ranks: ``top1``, ``top5``; and ``images`` of the classes."""
        first, any_of_five, count, broken = self._total()
        if broken:
            raise _not_finite(f"{broken:,}")
        return {"top1": 100 * first / max(1, count), "top5": 100 * any_of_five / max(1, count), "images": count}


class ClassAccuracy(Counts):
    """Top-1 of each class by itself, whatever its share of the images.

    Args:
        num_classes: So many, from the first of the label space, can be counted.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes, 2)

    @torch.no_grad()
    def update(self, predictions_b: Tensor, targets_b: Tensor, counted_b: Tensor | None = None) -> None:
        """Count a batch of class indices, [B] int64 each; or only those of [B] bool."""
        rows = targets_b.clamp(0, len(self.counts) - 1)
        there = rows == targets_b  # what is beyond is not counted
        counted_b = there if counted_b is None else counted_b & there
        self._add(rows, counted_b, counted_b & (predictions_b == targets_b))

    def per_class(self) -> dict[int, tuple[int, int]]:
        """Of each class of which images count, by its index: so many, and right ones; over all ranks."""
        total = self._total()
        pairs = enumerate(zip(total[::2], total[1::2], strict=True))
        return {index: (images, right) for index, (images, right) in pairs if images}

    def compute(self) -> dict[str, float]:
        """``balanced_top1``: the mean percentage of the classes of which images count, over all ranks."""
        shares = [right / images for images, right in self.per_class().values()]
        return {"balanced_top1": 100 * sum(shares) / max(1, len(shares))}


class HierarchicalDistances(Counts):
    """How far predicted classes are from true ones in the tree.

    - ``mean_lca_error``: by how many levels the lowest common ancestor of prediction and truth lies above the truth; a
      right one counts 0, one in another tree of the forest counts as if there were a root above all (the hierarchical
      distance of arXiv 1912.09393, as depth).
    - ``mean_lca_error_of_mistakes``: the same over the wrong ones.
    - ``hierarchical_precision``, ``hierarchical_recall``: common ancestors, each class among its own, as a share of the
      prediction's and of the truth's, micro-averaged (Kiritchenko et al. 2006).

    Args:
        tree: The classes and their hierarchy.

    Raises:
        InvalidArgumentError: That is no tree; from ``compute``: a prediction or target was no class of it.
    """

    chains: Tensor
    depths: Tensor

    def __init__(self, tree: SemanticTree) -> None:
        super().__init__(7)
        check_tree(tree)
        chains = np.full((len(tree), int(tree.depths.max()) + 1), -1, np.int64)
        for index in range(len(tree)):
            chain = tree.chain(index)
            chains[index, : len(chain)] = chain[::-1]
        self.register_buffer("chains", torch.from_numpy(chains), persistent=False)
        self.register_buffer("depths", torch.from_numpy(tree.depths.astype(np.int64)), persistent=False)

    @torch.no_grad()
    def update(self, predictions_b: Tensor, targets_b: Tensor, counted_b: Tensor | None = None) -> None:
        """Count a batch of class indices, [B] int64 each; or only those of [B] bool.

        Raises:
            InvalidArgumentError: There are not as many predictions as targets.
        """
        if predictions_b.shape != targets_b.shape:
            raise InvalidArgumentError(
                f"Predictions of shape {list(predictions_b.shape)} and targets of {list(targets_b.shape)} are no pairs."
            )
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
        """Errors in levels, the rest in percent, over all ranks."""
        images, mistakes, errors, common, predicted, truth, impossible = self._total()
        if impossible:
            raise _out_of_range(impossible, len(self.depths))
        return {
            "mean_lca_error": errors / max(1, images),
            "mean_lca_error_of_mistakes": errors / max(1, mistakes),
            "hierarchical_precision": 100 * common / max(1, predicted),
            "hierarchical_recall": 100 * common / max(1, truth),
        }


class Calibration(Counts):
    """Whether confidences are shares of right predictions: the reliability diagram of arXiv 1706.04599.

    Args:
        bins: Equally wide parts of [0, 1].

    Raises:
        InvalidArgumentError: There are none; from ``compute``: a confidence was outside [0, 1].
    """

    def __init__(self, bins: int = 15) -> None:
        if bins < 1:
            raise InvalidArgumentError(f"bins is {bins}; it must be at least 1.")
        super().__init__(bins + 1, 3)  # the last: those that are none
        self.bins = bins

    @torch.no_grad()
    def update(self, confidence_b: Tensor, right_b: Tensor, counted_b: Tensor | None = None) -> None:
        """Count a batch: confidences in [0, 1], whether predictions were right, [B] each; or only those of [B] bool."""
        confidence_b = confidence_b.float()
        right_b = right_b.bool()
        counted_b = torch.ones_like(right_b) if counted_b is None else counted_b
        there = (confidence_b > -_ROUNDING) & (confidence_b < 1 + _ROUNDING)  # not NaN either
        confidence_b = confidence_b.where(there, 0)
        at = (confidence_b * self.bins).long().clamp_(0, self.bins - 1).where(there, self.bins)
        millionths = (confidence_b * 1e6).round().long()  # whole, so that sums are exact in any order
        self._add(at, counted_b, counted_b & right_b, millionths * counted_b)

    def compute(self) -> dict[str, float | list[dict[str, float]]]:
        """``calibration_error``: the expected one in percent; ``reliability``: per bin that has images, its figures."""
        *total, impossible, _, _ = self._total()
        if impossible:
            raise InvalidArgumentError(f"The confidences of {impossible:,} images are not in [0, 1].")
        rows, images = [], max(1, sum(total[::3]))
        error = 0.0
        for number in range(self.bins):
            count, right, millionths = total[3 * number : 3 * number + 3]
            if not count:
                continue
            accuracy, confidence = 100 * right / count, 100 * millionths / 1e6 / count
            error += count / images * abs(accuracy - confidence)
            rows.append({"images": count, "confidence": confidence, "accuracy": accuracy})
        return {"calibration_error": error, "reliability": rows}
