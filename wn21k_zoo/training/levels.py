"""The levels of a tree as tensors: where each level's outputs are, and each class's ancestor on each level.

Shape suffixes: B batch, N classes, K levels.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from wn21k_zoo.errors import InvalidArgumentError
from wn21k_zoo.hierarchy import Hierarchy
from wn21k_zoo.tree import SemanticTree

__all__ = ["Levels", "Order", "check_tree"]

Order = Literal["published", "level"]
_MAX_WEIGHT = 20.0  # arXiv 2104.10972 has no bound; the published code has this one


class Levels(nn.Module):
    """The levels with a softmax of their own: the depths with more than one class (arXiv 2104.10972, section 3.3).

    Args:
        tree: The classes and their hierarchy.
        order: Order of the logits: ``published`` is that of the tree's label space; in ``level`` order the classes of
            one level are adjacent, sorted by wnid. A network trained so has the classes
            ``[tree.wnids[index] for index in levels.columns]``.

    Attributes:
        depths: Depth of each level, K numbers.
        slices: Where each level is in level order.
        weights: W_k of each level, K numbers: N over the number of classes that are as deep or deeper, at most 20.
        ancestors: Position within level k of a class's ancestor (or itself), -1 where it has none, [N, K] int64; rows
            are in the order of the label space, whatever ``order`` is.
        columns: Index in the label space of the class at each position of the level order, [N] int64.
        positions: Inverse of ``columns``, [N] int64.
    """

    ancestors: Tensor
    columns: Tensor
    positions: Tensor

    def __init__(self, tree: SemanticTree, order: Order = "published") -> None:
        super().__init__()
        check_tree(tree)
        if order not in ("published", "level"):
            raise InvalidArgumentError(f"order must be 'published' or 'level', not {order!r}.")
        hierarchy = Hierarchy(tree)
        self.tree, self.order, self.num_classes = tree, order, len(tree)
        self._widths = [where.stop - where.start for where in hierarchy.depth_slices]
        self.depths = tuple(depth for depth, _ in hierarchy.levels)
        self.slices = tuple(where for _, where in hierarchy.levels)
        self.weights = tuple(min(_MAX_WEIGHT, len(tree) / (len(tree) - where.start)) for where in self.slices)
        table = tree.ancestor_table
        ancestors = np.where(table >= 0, hierarchy.position[table] - hierarchy.starts[:-1], -1)[:, list(self.depths)]
        self.register_buffer("ancestors", torch.from_numpy(ancestors), persistent=False)
        self.register_buffer("columns", torch.from_numpy(hierarchy.order.copy()), persistent=False)
        self.register_buffer("positions", torch.from_numpy(hierarchy.position.copy()), persistent=False)

    def extra_repr(self) -> str:
        """Return what printing the levels shows of them."""
        return f"{self.tree!r}, order={self.order!r}"

    def check_there_are_levels(self) -> None:
        """Check that there is a level, that is, two classes of the same depth.

        Raises:
            InvalidArgumentError: There is none.
        """
        if not self.depths:
            raise InvalidArgumentError(
                f"The tree {self.tree.name} has no level: no two of its classes have the same depth, so there is "
                "nothing to choose from."
            )

    def split(self, logits_bn: Tensor) -> list[Tensor]:
        """Split logits by level, in float32: [B, N] -> K tensors [B, size of the level]."""
        self.check_width(logits_bn)
        if self.order == "published":
            logits_bn = logits_bn.index_select(1, self.columns)
        # Not by slicing: the gradient of each slice would be as large as all the logits.
        parts = torch.split(logits_bn.float(), self._widths, 1)
        return [parts[depth] for depth in self.depths]

    def check_width(self, logits: Tensor, name: str = "logits") -> None:
        """Check that there is an output of a floating-point dtype for each class.

        Raises:
            InvalidArgumentError: There is not.
        """
        if not isinstance(logits, Tensor):
            raise InvalidArgumentError(f"{name} must be a tensor, not {type(logits).__name__}; use torch.as_tensor.")
        if not logits.is_floating_point():
            raise InvalidArgumentError(f"{name} must have a floating-point dtype, not {logits.dtype}.")
        if logits.ndim != 2 or logits.shape[1] != self.num_classes:
            advice = "; for a loss per position, put classes last and flatten the others" if logits.ndim > 2 else ""
            raise InvalidArgumentError(
                f"{name} must have the shape [batch, {self.num_classes}], one output per class of {self.tree.name}; "
                f"they have {list(logits.shape)}{advice}."
            )

    def check(self, logits_bn: Tensor, targets_b: Tensor) -> None:
        """Check that shapes fit, at no cost; on the CPU also that targets are in range.

        On other devices that would wait for the device; see :meth:`in_range`.

        Raises:
            InvalidArgumentError: Shapes do not fit, or targets are out of range.
        """
        self.check_width(logits_bn)
        if not isinstance(targets_b, Tensor):
            raise InvalidArgumentError(f"targets must be a tensor, not {type(targets_b).__name__}.")
        if targets_b.shape != logits_bn.shape[:1] or targets_b.dtype != torch.int64:
            advice = ""
            if targets_b.shape == logits_bn.shape and targets_b.is_floating_point():
                advice = "; for mixed images, add the losses of both targets, weighted by their shares"
            elif targets_b.shape == logits_bn.shape:
                advice = "; use targets.int().argmax(1)"
            elif targets_b.shape == logits_bn.shape[:1] and not targets_b.is_floating_point():
                advice = "; use targets.long()"
            raise InvalidArgumentError(
                f"targets must be class indices, int64 of the shape [{len(logits_bn)}]; they are {targets_b.dtype} of "
                f"{list(targets_b.shape)}{advice}."
            )
        if targets_b.device.type == "cpu" and not torch.compiler.is_compiling():
            self.check_range(targets_b)

    def check_range(self, targets_b: Tensor) -> None:
        """Raise :class:`InvalidArgumentError` for targets that are not classes; waits for the device."""
        if not len(targets_b):
            return
        low, high = (int(bound) for bound in torch.aminmax(targets_b))
        if low < 0 or high >= self.num_classes:
            alike = "do the data and the tree use the same label space?"
            what = "leave out the rows of targets that do not count." if low < 0 else alike
            raise InvalidArgumentError(
                f"A target is {low if low < 0 else high}, but {self.tree.name} has the classes 0 to "
                f"{self.num_classes - 1}; {what}"
            )

    def in_range(self, targets_b: Tensor) -> tuple[Tensor, Tensor]:
        """Return targets that are safe to look up, and whether each was in range, [B] both; waits for nothing."""
        valid_b = (targets_b >= 0) & (targets_b < self.num_classes)
        return targets_b.where(valid_b, 0), valid_b


def check_tree(tree: object) -> None:
    """Check that an argument is a tree.

    Raises:
        InvalidArgumentError: It is not.
    """
    if not isinstance(tree, SemanticTree):
        raise InvalidArgumentError(f"{tree!r:.60} is not a tree; pass one such as SemanticTree.load('fall11').")
