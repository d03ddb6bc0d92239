"""The contents of a prediction: labels per level, a path down the tree, and the model's own top classes."""

from __future__ import annotations

import html
import json
from dataclasses import asdict, dataclass
from typing import Any, get_args

from wn21k_zoo.checkpoints import Head
from wn21k_zoo.errors import InvalidArgumentError, Wn21kError, check_share

__all__ = ["Label", "Level", "Output", "Prediction", "error_to_dict", "json_schema"]


@dataclass(frozen=True, kw_only=True)
class Label:
    """A node of the semantic tree with its scores for one image.

    Attributes:
        index: Index of the node in the tree.
        wnid: WordNet 3.0 noun id, since the name alone may be ambiguous; empty if the class is not a synset.
        name: Lemmas, joined by ', '; or the class's own name.
        definition: WordNet's definition; empty if the class is not a synset.
        depth: Number of ancestors in the tree.
        probability: p in [0, 1], as the kind of head defines it (:class:`wn21k_zoo.hierarchy.Decoder`).
        confidence: In [0, 1]; never above the confidence of the parent.
    """

    index: int
    wnid: str
    name: str
    definition: str
    depth: int
    probability: float
    confidence: float

    @property
    def short_name(self) -> str:
        """The first lemma; a class's own name is not shortened."""
        return _short(self)

    def __str__(self) -> str:
        return f"{self.name} ({self.wnid}) {self.confidence:.2f}" if self.wnid else f"{self.name} {self.confidence:.2f}"


@dataclass(frozen=True, kw_only=True)
class Level:
    """The best labels of one level, the most probable first; nodes that score 0 are left out.

    Attributes:
        depth: Depth of all nodes of the level.
        labels: At most ``top_k`` of them.
    """

    depth: int
    labels: tuple[Label, ...]


@dataclass(frozen=True, kw_only=True)
class Output:
    """One output of the model's head, in its own label space.

    Attributes:
        index: Index of the output.
        wnid: Its class; empty if that is not a synset.
        name: Lemmas, joined by ', '; or the class's own name.
        definition: WordNet's definition; empty if the class is not a synset.
        probability: Softmax, or sigmoid, over all outputs.
    """

    index: int
    wnid: str
    name: str
    definition: str
    probability: float

    @property
    def short_name(self) -> str:
        """As :attr:`Label.short_name`."""
        return _short(self)


@dataclass(frozen=True, kw_only=True, repr=False)
class Prediction:
    """Everything that was predicted for one image.

    How a label's p and confidence follow from the outputs depends on the kind of head; see
    :class:`wn21k_zoo.hierarchy.Decoder`. If the classes are not synsets (:class:`wn21k_zoo.ClassNames`), each is a
    root, all are on one level, and p = confidence is the class's output.

    Attributes:
        source: Path, URL or name of the image; None for data in memory.
        model: The model that predicted.
        label_space: Name of its head's label space.
        head: Kind of its head.
        tree: Name of the tree that the labels belong to; that of the label space if the classes are not synsets.
        threshold: Confidence that :attr:`label` must reach.
        label: The deepest label on the path whose confidence reaches the threshold, or None if not even the root's
            does: a coarser label that is likely right rather than a fine one that is a guess. It is always derived
            from path and threshold; a given value is ignored.
        levels: For each depth that has more than one class, its best labels.
        path: From the root of highest confidence, always to the child of highest p, to a leaf or until all children
            score 0.
        top_k: The best outputs in the model's own label space, as timm and transformers show them.
        unmapped: Share of the outputs that belongs to no node of the tree.
    """

    source: str | None
    model: str
    label_space: str
    head: str
    tree: str
    threshold: float
    label: Label | None = None
    levels: tuple[Level, ...]
    path: tuple[Label, ...]
    top_k: tuple[Output, ...]
    unmapped: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", self.label_at(self.threshold))

    def label_at(self, threshold: float) -> Label | None:
        """What :attr:`label` is with another threshold in [0, 1].

        Raises:
            InvalidArgumentError: The threshold is not in [0, 1].
        """
        limit = check_share("threshold", threshold)
        return next((label for label in reversed(self.path) if label.confidence >= limit), None)

    def labels(self, threshold: float | None = None) -> tuple[Label, ...]:
        """Each level's most probable label, if its probability is above the threshold, as in the published demo.

        Args:
            threshold: In [0, 1]; by default the prediction's own.
        """
        limit = self.threshold if threshold is None else check_share("threshold", threshold)
        best = (level.labels[0] for level in self.levels if level.labels)
        return tuple(label for label in best if label.probability > limit)

    def level(self, depth: int) -> Level:
        """The level at a depth.

        Raises:
            InvalidArgumentError: The tree has no level of that depth.
        """
        for level in self.levels:
            if level.depth == depth:
                return level
        known = ", ".join(str(level.depth) for level in self.levels) or "none"
        raise InvalidArgumentError(f"The tree {self.tree} has no level {depth}; its levels are {known}.")

    def to_dict(self) -> dict[str, Any]:
        """The prediction as plain lists and dicts; :func:`json_schema` describes it."""
        return {
            "source": self.source,
            "model": self.model,
            "label_space": self.label_space,
            "head": self.head,
            "tree": self.tree,
            "threshold": self.threshold,
            "label": asdict(self.label) if self.label else None,
            "path": [asdict(label) for label in self.path],
            "levels": [
                {"depth": level.depth, "labels": [asdict(label) for label in level.labels]} for level in self.levels
            ],
            "top_k": [asdict(output) for output in self.top_k],
            "unmapped": self.unmapped,
        }

    def to_json(self, indent: int | None = None) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        path = " > ".join(f"{label.short_name} {label.confidence:.2f}" for label in self.path)
        return f"{self.label.name if self.label else 'no label'} | {path}"

    def __repr__(self) -> str:
        return f"Prediction({self.source!r}: {self.label or 'no label'}, model={self.model!r})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{level.depth}</td><td>{html.escape(label.name)}</td><td><code>{label.wnid}</code></td>"
            f"<td>{label.probability:.3f}</td><td>{label.confidence:.3f}</td>"
            f"<td>{html.escape(label.definition)}</td></tr>"
            for level in self.levels
            for label in level.labels[:1]
        )
        title = html.escape(self.label.name if self.label else "no label reaches the threshold")
        tree = self.tree if self.tree != self.label_space else None
        about = html.escape(" · ".join(filter(None, [self.source, self.model, self.label_space, tree])))
        return (
            f"<table><caption><b>{title}</b><br>{about}</caption><thead><tr><th>level</th><th>label</th><th>wnid</th>"
            f"<th>probability</th><th>confidence</th><th>definition</th></tr></thead><tbody>{rows}</tbody></table>"
        )


def _short(named: Label | Output) -> str:
    return named.name.split(", ")[0] if named.wnid else named.name


def error_to_dict(source: str | None, error: Wn21kError) -> dict[str, Any]:
    """The dict that takes a prediction's place when an image could not be used."""
    return {"source": source, "error": {"type": type(error).__name__, "message": str(error)}}


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of one result: a prediction, or the error in its place."""
    number = {"type": "number", "minimum": 0, "maximum": 1}
    text, index = {"type": "string"}, {"type": "integer", "minimum": 0}
    source = {"type": ["string", "null"], "description": "path, URL or name of the image; null for data in memory"}
    wnid = {"type": "string", "pattern": "^(n[0-9]{8})?$", "description": "empty if the class is not a synset"}
    synset = {"index": index, "wnid": wnid, "name": text, "definition": text}
    label = {"$ref": "#/$defs/label"}
    level = {"depth": index, "labels": {"type": "array", "items": label}}
    prediction = {
        "source": source,
        "model": text,
        "label_space": text,
        "head": {"enum": [*get_args(Head)]},
        "tree": text,
        "threshold": number,
        "label": {"anyOf": [label, {"type": "null"}], "description": "deepest label that reaches the threshold"},
        "path": {"type": "array", "items": label, "description": "from the root down"},
        "levels": {"type": "array", "items": _closed(level)},
        "top_k": {"type": "array", "items": _closed({**synset, "probability": number})},
        "unmapped": number,
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "wn21k predict, one result",
        "oneOf": [_closed(prediction), _closed({"source": source, "error": _closed({"type": text, "message": text})})],
        "$defs": {"label": _closed({**synset, "depth": index, "probability": number, "confidence": number})},
    }


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
