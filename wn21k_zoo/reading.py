"""Turn a network's outputs into what a prediction says: through the semantic tree, or by class names alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.checkpoints import Head
from wn21k_zoo.hierarchy import Decoder, NodeScores
from wn21k_zoo.labels import ClassNames, LabelSpace
from wn21k_zoo.prediction import Label, Level, Output
from wn21k_zoo.tree import SemanticTree

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["NamesReader", "TreeReader", "default_tree", "largest"]


class TreeReader:
    """Reads outputs that stand for synsets.

    Args:
        tree: Tree of the labels.
        label_space: Class of each output.
        head: Kind of head.
        device: Device of the logits.

    Raises:
        TreeError: As :class:`wn21k_zoo.hierarchy.Decoder`.
    """

    def __init__(self, tree: SemanticTree, label_space: LabelSpace, head: Head, device: torch.device | str) -> None:
        self._tree, self._space = tree, label_space
        self._decoder = Decoder(tree, label_space, head, device)

    def __call__(self, logits: Tensor, top_k: int) -> list[dict[str, Any]]:
        """Return for each image what :class:`wn21k_zoo.Prediction` says of it: levels, path, top_k and unmapped.

        Args:
            logits: Finite, [batch, classes].
            top_k: How many labels per level, and how many outputs, to list.
        """
        rows = NodeScores(**{name: scores.cpu() for name, scores in vars(self._decoder(logits)).items()})
        return [self._read(rows, row, top_k) for row in range(len(logits))]

    def _read(self, scores: NodeScores, row: int, top_k: int) -> dict[str, Any]:
        probability, confidence = scores.probability[row].numpy(), scores.confidence[row].numpy()
        outputs, rank = scores.outputs[row].numpy(), scores.rank[row].numpy()
        hierarchy, space = self._decoder.hierarchy, self._space

        def label(position: int) -> Label:
            node = self._tree[int(hierarchy.order[position])]
            return Label(**vars(node), probability=float(probability[position]), confidence=float(confidence[position]))

        levels = [
            Level(
                depth=depth,
                labels=tuple(
                    label(nodes.start + int(best)) for best in largest(rank[nodes], top_k, probability[nodes] > 0)
                ),
            )
            for depth, nodes in hierarchy.levels
        ]
        return {
            "levels": tuple(levels),
            "path": tuple(label(position) for position in hierarchy.best_path(rank, probability)),
            "top_k": tuple(
                Output(
                    index=(index := int(self._decoder.output_order[best])),
                    wnid=space.wnids[index],
                    name=space.names[index],
                    definition=space.definitions[index],
                    probability=float(outputs[best]),
                )
                for best in largest(scores.output_rank[row].numpy(), top_k)
            ),
            "unmapped": min(1.0, float(scores.unmapped[row])),
        }


class NamesReader:
    """Reads outputs that stand for classes other than synsets: they are the roots of a tree with one level.

    Args:
        classes: Class of each output.
        head: Kind of head, ``softmax`` or ``sigmoid``.
    """

    def __init__(self, classes: ClassNames, head: Head) -> None:
        self._names, self._head = classes.names, head

    def __call__(self, logits: Tensor, top_k: int) -> list[dict[str, Any]]:
        """As :meth:`TreeReader.__call__`."""
        logits = logits.float()
        outputs = logits.sigmoid() if self._head == "sigmoid" else logits.softmax(dim=-1)
        return [self._read(*row, top_k) for row in zip(logits.cpu().numpy(), outputs.cpu().numpy(), strict=True)]

    def _read(self, logits: NDArray[np.float32], outputs: NDArray[np.float32], top_k: int) -> dict[str, Any]:
        best = [
            Output(index=index, wnid="", name=self._names[index], definition="", probability=float(outputs[index]))
            for index in map(int, largest(logits, top_k))
        ]
        labels = tuple(
            Label(**vars(output), depth=0, confidence=output.probability) for output in best if output.probability > 0
        )
        levels = (Level(depth=0, labels=labels),) if len(self._names) > 1 else ()
        return {"levels": levels, "path": labels[:1], "top_k": tuple(best), "unmapped": 0.0}


def default_tree(label_space: LabelSpace, head: Head) -> SemanticTree:
    """Return the tree to use when none is named: fall11, winter21 for its own classes, or that over the classes."""
    winter21 = SemanticTree.load("winter21")
    if len(label_space) == len(winter21) and set(label_space.wnids) == set(winter21.wnids):
        return winter21
    fall11 = SemanticTree.load("fall11")
    if head == "semantic_softmax" and set(label_space.wnids) != set(fall11.wnids):
        return SemanticTree.from_label_space(label_space)
    return fall11


def largest(values: NDArray[np.float32], count: int, among: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Indices of the ``count`` largest values, of all or some, the largest first; ties go to the lower index."""
    candidates = np.arange(len(values)) if among is None else np.flatnonzero(among)
    if count < len(candidates):
        bound = np.partition(values[candidates], -count)[-count]
        candidates = candidates[values[candidates] >= bound]
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]
