"""The semantic tree as tensors: how a head's logits become a score for every node of the tree.

Everything here is in *level order*: nodes sorted by depth and, inside a depth, by wnid. Classes of one level are then
adjacent, parents come before their children, ties are broken by wnid, and no result depends on the order in which a
model or a tree happens to list its classes.

Shape suffixes: B batch, K outputs of the head, N nodes of the tree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.checkpoints import Head, check_head
from wn21k_zoo.errors import TreeError
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.synsets import load_nouns
from wn21k_zoo.tree import SemanticTree

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Decoder", "Hierarchy", "NodeScores"]

_SMALLEST = 1e-30  # safe to divide by


@dataclass(frozen=True, kw_only=True)
class NodeScores:
    """Scores of a batch.

    Attributes:
        outputs: Softmax, or sigmoid, over all outputs, sorted by wnid (:attr:`Decoder.output_order`), [B, K].
        probability: p of each node in level order, [B, N].
        confidence: Confidence of each node in level order, [B, N]; never above that of its parent.
        output_rank: What outputs are compared by, sorted by wnid, [B, K]: their logits, as probabilities near 0 and 1
            are equal after rounding.
        rank: What nodes of one depth are compared by, in level order, [B, N]: for a semantic softmax and for a sigmoid
            the logits in place of p, -inf for a node without classes; for a softmax p.
        unmapped: What belongs to no node of the tree, [B]: the sum (softmax) or maximum (sigmoid) over the classes that
            are not in the tree and have no ancestor there; 0 for a semantic softmax.
    """

    outputs: Tensor
    probability: Tensor
    confidence: Tensor
    output_rank: Tensor
    rank: Tensor
    unmapped: Tensor


class Hierarchy:
    """A tree in level order.

    Attributes:
        tree: The tree.
        order: Tree index of each node in level order, [N].
        parents: Position in level order of each node's parent, -1 for roots, [N].
        starts: Position of the first node of each depth and, last, N; [max depth + 2].

    Args:
        tree: The tree.
        device: Device of the tensors that the methods take.
    """

    def __init__(self, tree: SemanticTree, device: torch.device | str = "cpu") -> None:
        import torch

        self.tree = tree
        self.order: NDArray[np.int64] = np.lexsort((tree.label_space.positions, tree.depths))
        self.position: NDArray[np.int64] = np.argsort(self.order)
        parents = tree.parents[self.order]
        self.parents: NDArray[np.int64] = np.where(parents >= 0, self.position[parents], -1)
        depths = tree.depths[self.order]
        self.starts: list[int] = [int(start) for start in np.searchsorted(depths, np.arange(depths[-1] + 2))]
        # For each depth below the roots, the deepest first: positions of its nodes and of their parents.
        self._edges = [(depth, torch.from_numpy(self.parents[depth]).to(device)) for depth in self.depth_slices[:0:-1]]

    def __len__(self) -> int:
        return len(self.order)

    @property
    def depth_slices(self) -> list[slice]:
        """The slice of each depth's nodes in level order, from depth 0."""
        return [slice(start, end) for start, end in zip(self.starts, self.starts[1:], strict=False)]

    @property
    def levels(self) -> list[tuple[int, slice]]:
        """Depth and slice of each level; a depth with one node is no level, as there is nothing to choose from."""
        return [(depth, nodes) for depth, nodes in enumerate(self.depth_slices) if nodes.stop - nodes.start > 1]

    def level_softmax(self, scores_bn: Tensor) -> Tensor:
        """Softmax inside each depth, [B, N] -> [B, N]; 1 where a depth has one node (arXiv 2104.10972, section 3.3)."""
        import torch

        return torch.cat([scores_bn[:, depth].softmax(dim=-1) for depth in self.depth_slices], dim=-1)

    def minimum_over_path(self, probability_bn: Tensor) -> Tensor:
        """For each node the minimum over it and its ancestors, [B, N] -> [B, N]."""
        import torch

        result = probability_bn.clone()
        for depth, above in reversed(self._edges):
            result[:, depth] = torch.minimum(result[:, depth], result[:, above])
        return result

    def sum_over_subtree(self, mass_bn: Tensor) -> Tensor:
        """For each node the sum over it and its descendants, [B, N] -> [B, N]."""
        result = mass_bn.clone()
        for depth, above in self._edges:
            result.scatter_add_(1, above.expand(result.shape[0], -1), result[:, depth].clone())
        return result

    def maximum_over_subtree(self, scores_bn: Tensor) -> Tensor:
        """For each node the maximum over it and its descendants, [B, N] -> [B, N]."""
        result = scores_bn.clone()
        for depth, above in self._edges:
            result.scatter_reduce_(1, above.expand(result.shape[0], -1), result[:, depth].clone(), reduce="amax")
        return result

    def above_children(self, scores_bn: Tensor) -> Tensor:
        """For each node its score minus the highest of its children's, at least 0, [B, N] -> [B, N]."""
        highest = scores_bn.new_zeros(scores_bn.shape)
        for depth, above in self._edges:
            highest.scatter_reduce_(1, above.expand(highest.shape[0], -1), scores_bn[:, depth], reduce="amax")
        return (scores_bn - highest).clamp_min(0)

    def leaf_mass(self, probability_bn: Tensor) -> Tensor:
        """A distribution over the leaves that sums to 1, [B, N] -> [B, N].

        The roots share 1, and a node's children share its mass, in proportion to their p.
        """
        p = probability_bn.clamp_min(_SMALLEST)  # in case all children have 0
        mass = p / p[:, : self.starts[1]].sum(dim=1, keepdim=True)
        result = mass.clone()
        for depth, above in reversed(self._edges):
            of_children = p.new_zeros(p.shape).scatter_add_(1, above.expand(p.shape[0], -1), p[:, depth])
            mass[:, depth] = mass[:, above] * p[:, depth] / of_children[:, above]
            result[:, depth] = mass[:, depth]
            result[:, above] = 0
        return result

    def best_path(self, rank_n: NDArray[np.float32], probability_n: NDArray[np.float32]) -> list[int]:
        """Walk from the root of highest p down to a leaf, always to the child of highest p.

        The path ends early where all children score 0. Ties go to the lower wnid.

        Args:
            rank_n: What one image's nodes are compared by, [N] (:attr:`NodeScores.rank`).
            probability_n: Their p, [N].

        Returns:
            Positions in level order; empty when all roots score 0.
        """
        best = int(np.argmax(rank_n[: self.starts[1]]))
        if probability_n[best] <= 0:
            return []
        path = [best]
        while len(children := self._children(path[-1])):
            best = int(children[np.argmax(rank_n[children])])
            if probability_n[best] <= 0:
                break
            path.append(best)
        return path

    def _children(self, position: int) -> NDArray[np.int64]:
        # child_indices are sorted by tree index; level order breaks ties by wnid.
        return np.sort(self.position[self.tree.child_indices(int(self.order[position]))])


class Decoder:
    """Turns the logits of one kind of head over one label space into the scores of one tree's nodes.

    - ``semantic_softmax``: p(c) is the softmax within c's depth; confidence(c) is the minimum of p over c and its
      ancestors.
    - ``softmax``: p = confidence of a node is the sum over the classes in its subtree. A class that is not in the tree
      counts for its nearest ancestor there; one without such an ancestor is ``unmapped``.
    - ``sigmoid``: p = confidence of a node is the maximum over the classes in its subtree.

    Args:
        tree: Tree whose nodes are scored.
        label_space: Class of each output.
        head: Kind of head.
        device: Device of the logits.

    Attributes:
        output_order: The label space's indices sorted by wnid, [K].

    Raises:
        InvalidArgumentError: There is no such head.
        TreeError: The head is a semantic softmax over other classes than the tree's; outside their levels its outputs
            mean nothing.
    """

    def __init__(
        self, tree: SemanticTree, label_space: LabelSpace, head: Head, device: torch.device | str = "cpu"
    ) -> None:
        import torch

        check_head(head)
        self.hierarchy = Hierarchy(tree, device)
        self.head = head
        self.output_order: NDArray[np.int64] = np.argsort(label_space.positions)
        self._by_wnid = torch.from_numpy(self.output_order).to(device)
        if head == "semantic_softmax":
            if set(label_space.wnids) != set(tree.wnids):
                raise TreeError(
                    f"A semantic softmax over {label_space.name} can only be read with the tree over the same classes, "
                    f"not with {tree.name}; leave out tree."
                )
            nodes_by_wnid = np.argsort(tree.label_space.positions)
            level_order = np.argsort(self.hierarchy.position[nodes_by_wnid])
            self._level_order = torch.from_numpy(level_order).to(device)
            return
        positions = label_space.positions[self.output_order]
        nearest = load_nouns().nearest_members(positions, tree.label_space.positions)
        mapped = nearest >= 0
        self._mapped = torch.from_numpy(np.flatnonzero(mapped)).to(device)
        self._targets = torch.from_numpy(self.hierarchy.position[nearest[mapped]]).to(device)
        self._unmapped = torch.from_numpy(np.flatnonzero(~mapped)).to(device)

    def __call__(self, logits_bk: Tensor) -> NodeScores:
        """Score a batch of logits, [B, K] in the label space's order; computed in float32."""
        logits_bk = logits_bk.float()[:, self._by_wnid]
        outputs = logits_bk.sigmoid() if self.head == "sigmoid" else logits_bk.softmax(dim=-1)
        if self.head == "semantic_softmax":
            rank = logits_bk[:, self._level_order]
            probability = self.hierarchy.level_softmax(rank)
            return NodeScores(
                outputs=outputs,
                probability=probability,
                confidence=self.hierarchy.minimum_over_path(probability),
                output_rank=logits_bk,
                rank=rank,
                unmapped=outputs.new_zeros(outputs.shape[0]),
            )
        left_over = outputs[:, self._unmapped]
        if self.head == "softmax":
            unmapped = left_over.sum(dim=-1)
            scores = self.hierarchy.sum_over_subtree(self.assigned(outputs))
            rank = scores.clamp_(max=1.0)  # rounding can carry a sum just above 1
        else:
            unmapped = left_over.amax(dim=-1) if left_over.shape[1] else outputs.new_zeros(outputs.shape[0])
            scores, rank = self._highest(outputs, 0.0), self._highest(logits_bk, -math.inf)
        return NodeScores(
            outputs=outputs, probability=scores, confidence=scores, output_rank=logits_bk, rank=rank, unmapped=unmapped
        )

    def _highest(self, values_bk: Tensor, otherwise: float) -> Tensor:
        """For each node the maximum over the classes in its subtree, ``otherwise`` without any; [B, K] -> [B, N]."""
        nodes = values_bk.new_full((values_bk.shape[0], len(self.hierarchy)), otherwise)
        targets = self._targets.expand(values_bk.shape[0], -1)
        nodes.scatter_reduce_(1, targets, values_bk[:, self._mapped], reduce="amax")
        return self.hierarchy.maximum_over_subtree(nodes)

    def own_mass(self, logits_bk: Tensor) -> Tensor:
        """Mass of each node itself, without the nodes below it, [B, K] -> [B, N] in level order; at most 1 in total.

        - ``softmax``: the sum over the classes that count for the node itself.
        - ``semantic_softmax``: it does not say how deep an image's class is, so a leaf is assumed; each node passes its
          mass on to its children in proportion to their p.
        - ``sigmoid``: the excess of the node's score over the highest of its children's, in proportion.
        """
        if self.head == "softmax":
            return self.assigned(logits_bk.float()[:, self._by_wnid].softmax(dim=-1))
        probability = self(logits_bk).probability
        if self.head == "semantic_softmax":
            return self.hierarchy.leaf_mass(probability)
        own = self.hierarchy.above_children(probability)
        return own / own.sum(dim=-1, keepdim=True).clamp_min(_SMALLEST)

    def assigned(self, outputs_bk: Tensor) -> Tensor:
        """For each node the sum over the classes that count for the node itself, for outputs in :attr:`output_order`.

        The outputs are those of a softmax or a sigmoid; [B, K] -> [B, N] in level order.
        """
        values = outputs_bk[:, self._mapped]
        nodes = values.new_zeros(values.shape[0], len(self.hierarchy))
        return nodes.scatter_add_(1, self._targets.expand(values.shape[0], -1), values)
