"""The semantic tree: which class of a list is an ancestor of which.

Section 3.2 of arXiv 2104.10972: each WordNet synset has one parent (:mod:`wn21k_zoo.synsets`); a class's ancestors are
the synsets on its way to the root that are themselves classes; its depth is their number. Classes that share a depth
form a level, over which a 21K-P head's outputs are a softmax.
"""

from __future__ import annotations

import functools
import hashlib
import json
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo import drawing
from wn21k_zoo.errors import (
    InvalidArgumentError,
    TreeError,
    UnknownSynsetError,
    UnknownTreeError,
    did_you_mean,
    first_line,
    whole_number,
)
from wn21k_zoo.files import expanded, refuse_compressed
from wn21k_zoo.labels import LABEL_SPACE_ALIASES, LABEL_SPACES, LabelSpace, ordered
from wn21k_zoo.matching import forms_of, match_rank
from wn21k_zoo.synsets import WNID_PATTERN, load_nouns

__all__ = ["Node", "SemanticTree", "TreeDifference"]


_DEEPEST = 64  # levels, more than any tree of WordNet's nouns has


@dataclass(frozen=True, kw_only=True)
class Node:
    """One class of a tree.

    Attributes:
        index: Position of the class in the tree's list.
        wnid: WordNet 3.0 noun id, the class's identity.
        name: Its lemmas, joined by ', '; not unique.
        definition: WordNet's definition.
        depth: Number of its ancestors in the tree; 0 for a root.
    """

    index: int
    wnid: str
    name: str
    definition: str
    depth: int

    def __str__(self) -> str:
        return f"{self.name} ({self.wnid})"


@dataclass(frozen=True, kw_only=True)
class TreeDifference:
    """How one tree differs from another; empty and false if nothing differs.

    Attributes:
        only_left: wnids that only the first tree has.
        only_right: wnids that only the second tree has.
        parents: For wnids in both whose parents differ: the parent in the first and in the second (None: a root).
        same_order: Whether both list the same classes in the same order.
    """

    only_left: tuple[str, ...]
    only_right: tuple[str, ...]
    parents: Mapping[str, tuple[str | None, str | None]]
    same_order: bool

    def __bool__(self) -> bool:
        return bool(self.only_left or self.only_right or self.parents or not self.same_order)


class SemanticTree:
    """A forest over a list of classes: each class has at most one parent.

    Create one with :meth:`load`, :meth:`from_wnids`, :meth:`from_file` or :meth:`from_published`. Wherever a method
    takes a ``node``, it takes an index, a wnid or a :class:`Node`.

    Attributes:
        name: Its name in results.
        label_space: The classes, in the order of the tree's indices.
        parents: Index of each class's parent, -1 for a root, int32, shape [len(tree)].
        depths: Number of each class's ancestors, int32, shape [len(tree)].

    Raises:
        InvalidArgumentError: ``label_space`` is not a :class:`LabelSpace`.
        TreeError: The parents have a cycle, or are not one index for each class.

    Example:
        >>> tree = SemanticTree.load("fall11")
        >>> [node.name for node in tree.ancestors("n02123045")][:2]
        ['domestic cat, house cat, Felis domesticus, Felis catus', 'domestic animal, domesticated animal']
    """

    def __init__(self, label_space: LabelSpace, parents: NDArray[np.int32], *, name: str | None = None) -> None:
        if not isinstance(label_space, LabelSpace):
            raise InvalidArgumentError(
                f"A tree is over a LabelSpace, whose classes are WordNet synsets, not over {label_space!r}."
            )
        self.name = name or label_space.name
        self.label_space = label_space
        self.parents = _checked(parents, len(label_space))
        self.depths = _depths(self.parents)
        self.parents.flags.writeable = False
        self.depths.flags.writeable = False

    # Where trees come from

    @classmethod
    def load(cls, name: str = "fall11") -> SemanticTree:
        """Load the tree over a shipped label space: 'fall11', 'winter21', or the name of any other.

        Raises:
            UnknownTreeError: No label space has that name.
            InvalidArgumentError: It is no name.
        """
        if not isinstance(name, str):
            raise InvalidArgumentError(
                f"{name!r:.100} is not the name of a tree; for wnids take SemanticTree.from_wnids."
            )
        full_name = LABEL_SPACE_ALIASES.get(name, name)
        if full_name not in LABEL_SPACES:
            known = (*LABEL_SPACE_ALIASES, *LABEL_SPACES)
            raise UnknownTreeError(
                f"No tree is called {name!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}; for your own "
                "list name a text file of wnids (in Python: SemanticTree.from_file, or from_wnids)."
            )
        return _load(full_name)

    @classmethod
    def find(cls, name: str | os.PathLike[str] | SemanticTree) -> SemanticTree:
        """Find a tree by its name, as :meth:`load`, or else in a file, as :meth:`from_file`; a tree is returned as is.

        Raises:
            UnknownTreeError: Neither has that name.
            InvalidArgumentError: It is no name.
            TreeError, LabelSpaceError, UnknownSynsetError: As :meth:`from_file`.
        """
        if isinstance(name, SemanticTree):
            return name
        name = os.fspath(name) if isinstance(name, os.PathLike) else name
        if isinstance(name, str) and name not in LABEL_SPACES and name not in LABEL_SPACE_ALIASES:
            path = expanded(name, UnknownTreeError)
            if path.is_file():
                return cls.from_file(path)
        return cls.load(name)

    @classmethod
    def from_label_space(cls, label_space: LabelSpace) -> SemanticTree:
        """The tree over the classes of ``label_space``; indices are those of its outputs."""
        nouns = load_nouns()
        parents = nouns.nearest_members(nouns.parents[label_space.positions].astype(np.int64), label_space.positions)
        short_names = {full: alias for alias, full in LABEL_SPACE_ALIASES.items()}
        return cls(label_space, parents, name=short_names.get(label_space.name))

    @classmethod
    def from_wnids(cls, wnids: Sequence[str | Node], *, name: str = "custom") -> SemanticTree:
        """The tree over any list of WordNet 3.0 noun synsets; indices are positions in that list.

        Args:
            wnids: wnids, or nodes of another tree.
            name: Its name in results.

        Raises:
            InvalidArgumentError: ``wnids`` is not a list, or has no order.
            UnknownSynsetError: An entry is not a noun synset of WordNet 3.0.
            DuplicateSynsetError: An entry appears twice.
            EmptyLabelSpaceError: The list is empty.
        """
        given = ordered("wnids", wnids)
        return cls.from_label_space(LabelSpace(name, tuple(x.wnid if isinstance(x, Node) else x for x in given)))

    @classmethod
    def from_file(cls, path: str | Path) -> SemanticTree:
        """The tree over the wnids in a text file: the first word of each line; '#' begins a comment.

        A file that ends in ``.pth`` is read by :meth:`from_published`.

        Raises:
            TreeError: As :meth:`from_published`.
            LabelSpaceError, UnknownSynsetError: As :meth:`LabelSpace.from_file`.
        """
        path = Path(path)
        if path.suffix in (".pth", ".pt"):
            return cls.from_published(path)
        return cls.from_label_space(LabelSpace.from_file(path, name=path.stem))

    @classmethod
    def from_published(cls, path: str | Path) -> SemanticTree:
        """Read a tree in the authors' format: a pickled dict with ``class_list`` and ``class_tree_list``.

        It is read by ``torch.load(weights_only=True)``, so no code in it runs. The tree is taken from the file as it
        is, not built anew; compare it with ours by :meth:`difference`.

        Raises:
            TreeError: The file cannot be read, is not in that format, or contradicts itself.
            LabelSpaceError, UnknownSynsetError: Its classes are not different noun synsets.
        """
        import torch

        path = Path(path)
        if not path.is_file():
            raise TreeError(f"There is no tree file {path}.")
        try:
            refuse_compressed(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # unpickling damaged or hostile bytes raises all kinds of errors
            raise TreeError(
                f"{path} cannot be loaded as a tree file without running its code ({first_line(error)})."
            ) from error
        if not isinstance(content, dict) or not {"class_list", "class_tree_list"} <= content.keys():
            raise TreeError(f"{path} is not a tree file: it has no entries class_list and class_tree_list.")
        chains = content["class_tree_list"]
        wnids = content["class_list"]
        if not isinstance(wnids, (list, tuple)) or not isinstance(chains, (list, tuple)):
            raise TreeError(f"{path} is not a tree file: class_list and class_tree_list are not lists.")
        if not all(isinstance(wnid, str) for wnid in wnids):
            raise TreeError(f"{path} is not a tree file: class_list does not hold WordNet ids.")
        if len(chains) != len(wnids):
            numbers = f"{len(wnids):,} classes, but {len(chains):,} entries in class_tree_list"
            raise TreeError(f"{path} has {numbers}.")
        if not all(
            isinstance(chain, (list, tuple)) and len(chain) <= _DEEPEST and all(type(i) is int for i in chain)
            for chain in chains
        ):
            raise TreeError(
                f"{path} is not a tree file: class_tree_list does not hold lists of at most {_DEEPEST} indices."
            )
        label_space = LabelSpace(path.stem, tuple(wnids))
        return cls(label_space, _parents_from_chains(chains, len(label_space), path))

    # Shape

    def __len__(self) -> int:
        return len(self.label_space)

    def __iter__(self) -> Iterator[Node]:
        return (self[index] for index in range(len(self)))

    def __contains__(self, node: object) -> bool:
        return self._find(node) is not None

    def __reduce__(self) -> tuple[Any, ...]:
        # Everything derived from these is derived anew, by a named function, as YAML needs.
        return _rebuilt, (type(self), self.label_space, self.parents, self.name)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SemanticTree):
            return NotImplemented
        return (self.name, self.label_space) == (other.name, other.label_space) and np.array_equal(
            self.parents, other.parents
        )

    def __hash__(self) -> int:
        return hash((self.name, self.label_space))

    def __repr__(self) -> str:
        levels = f"{len(self.levels)} level{'s' * (len(self.levels) != 1)}"
        return f"SemanticTree({self.name!r}, {len(self):,} classes, {levels})"

    @property
    def wnids(self) -> tuple[str, ...]:
        """The wnid of each class."""
        return self.label_space.wnids

    @functools.cached_property
    def levels(self) -> Mapping[int, NDArray[np.int64]]:
        """Depth -> indices of the classes at that depth, ascending, for each depth that has more than one class.

        These are the published hierarchies: a depth with a single class has nothing to choose from.
        """
        counts = np.bincount(self.depths)
        levels = {int(depth): np.flatnonzero(self.depths == depth) for depth in np.flatnonzero(counts > 1)}
        for indices in levels.values():
            indices.flags.writeable = False
        return MappingProxyType(levels)

    def chain(self, node: int | str | Node) -> list[int]:
        """Indices of a node, its parent, its grandparent, ... to the root."""
        parents, found = self._parent_list, [self.index(node)]
        while (parent := parents[found[-1]]) >= 0:
            found.append(parent)
        return found

    @functools.cached_property
    def class_tree_list(self) -> list[list[int]]:
        """The published form: the :meth:`chain` of each class. The lists are shared: copy what you change."""
        return [self.chain(index) for index in range(len(self))]

    @functools.cached_property
    def ancestor_table(self) -> NDArray[np.int64]:
        """Index of each class's ancestor at each depth: at its own depth the class itself, deeper -1.

        Shape [len(tree), deepest + 1]. ``tree.ancestor_table[predictions, depth]`` is what to compare on one level.
        """
        table = np.full((len(self), int(self.depths.max()) + 1), -1, np.int64)
        rows = nodes = np.arange(len(self))
        while len(rows):
            table[rows, self.depths[nodes]] = nodes
            above = self.parents[nodes].astype(np.int64)
            rows, nodes = rows[above >= 0], above[above >= 0]
        table.flags.writeable = False
        return table

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the :meth:`chain` of each class, as JSON without spaces, in hexadecimal."""
        chains = [self.chain(index) for index in range(len(self))]
        return hashlib.sha256(json.dumps(chains, separators=(",", ":")).encode()).hexdigest()

    # Nodes and their relations

    def index(self, node: int | str | Node) -> int:
        """Index of a node given as an index, a wnid or a :class:`Node`.

        Raises:
            UnknownSynsetError: The tree has no such node.
        """
        if (index := self._find(node)) is not None:
            return index
        key = node.wnid if isinstance(node, Node) else node
        if not isinstance(key, str):
            raise UnknownSynsetError(
                f"{key!r} is not a node of the tree {self.name}: use a wnid or 0 to {len(self) - 1}."
            )
        if not WNID_PATTERN.fullmatch(key):
            nodes = self.search(key, limit=3) if forms_of(key)[0] else ()
            found = ", ".join(f"{node.wnid} ({node.name.split(', ')[0]})" for node in nodes)
            hint = f" Did you mean {found}?" if found else " Search for a name with tree.search or wn21k tree search."
            raise UnknownSynsetError(f"{key!r} is not a wnid.{hint}")
        near = self.nearest(key)
        hint = f"its nearest ancestor there is {near}" if near else "nor is any of its ancestors"
        raise UnknownSynsetError(f"{key} is not a class of the tree {self.name}; {hint}.")

    def _find(self, node: object) -> int | None:
        key = node.wnid if isinstance(node, Node) else node
        if isinstance(key, str):
            return self.label_space.index.get(key)
        if isinstance(key, bool) or "bool" in str(getattr(key, "dtype", "")):
            return None
        try:  # also integers of NumPy and torch
            index = operator.index(cast(int, key))
        except (TypeError, ValueError, RuntimeError):
            return None
        return index if 0 <= index < len(self) else None

    def __getitem__(self, node: int | str | Node) -> Node:
        index = self.index(node)
        return Node(
            index=index,
            wnid=self.wnids[index],
            name=self.label_space.names[index],
            definition=self.label_space.definitions[index],
            depth=int(self.depths[index]),
        )

    def nearest(self, wnid: str) -> Node | None:
        """For any noun synset of WordNet 3.0: itself if it is in the tree, else its nearest ancestor there, or None.

        Raises:
            UnknownSynsetError: ``wnid`` is not a noun synset of WordNet 3.0.
        """
        nouns = load_nouns()
        index = int(nouns.nearest_members(nouns.positions([wnid]), self.label_space.positions)[0])
        return self[index] if index >= 0 else None

    def with_ancestors(self) -> SemanticTree:
        """The tree over the classes and, after them, all synsets above them in WordNet; classes keep their indices.

        Parents are WordNet's primary ones, whatever the tree's own are.
        """
        parents = load_nouns().parents
        above = {int(position) for position in self.label_space.positions}
        added: list[int] = []
        for position in self.label_space.positions:
            while (position := int(parents[position])) >= 0 and position not in above:
                above.add(position)
                added.append(position)
        if not added:
            return self
        wnids = [f"n{offset:08d}" for offset in load_nouns().offsets[sorted(added)]]
        return SemanticTree.from_wnids([*self.wnids, *wnids], name=f"{self.name}_with_ancestors")

    @property
    def roots(self) -> tuple[Node, ...]:
        """The classes without a parent, in the order of their indices."""
        return self._nodes(np.flatnonzero(self.parents < 0))

    def parent(self, node: int | str | Node) -> Node | None:
        """The parent, or None for a root."""
        parent = int(self.parents[self.index(node)])
        return self[parent] if parent >= 0 else None

    def ancestors(self, node: int | str | Node) -> tuple[Node, ...]:
        """The ancestors, the parent first and the root last."""
        return self._nodes(self.chain(node)[1:])

    def path(self, node: int | str | Node) -> tuple[Node, ...]:
        """From the root to the node, both included."""
        return self._nodes(self.chain(node)[::-1])

    def children(self, node: int | str | Node) -> tuple[Node, ...]:
        """The classes whose parent is the node, in the order of their indices."""
        return self._nodes(self.child_indices(self.index(node)))

    def descendants(self, node: int | str | Node) -> tuple[Node, ...]:
        """All classes below the node, depth first, without the node itself."""
        found: list[int] = []
        waiting = list(self.child_indices(self.index(node))[::-1])
        while waiting:
            found.append(int(waiting.pop()))
            waiting.extend(self.child_indices(found[-1])[::-1])
        return self._nodes(found)

    def lowest_common_ancestor(self, first: int | str | Node, second: int | str | Node) -> Node | None:
        """The deepest node that is equal to or above both; None if they have different roots."""
        above = set(self.chain(first))
        return next((self[index] for index in self.chain(second) if index in above), None)

    def distance(self, first: int | str | Node, second: int | str | Node) -> int | None:
        """Number of edges between two nodes, through their lowest common ancestor; None if they have none."""
        common = self.lowest_common_ancestor(first, second)
        if common is None:
            return None
        return int(self.depths[self.index(first)] + self.depths[self.index(second)]) - 2 * common.depth

    def distances(self, nodes: Sequence[int | str | Node] | None = None) -> NDArray[np.int32]:
        """The :meth:`distance` of each pair of nodes, by default of all classes, [n, n]; -1 where it is None.

        It takes 4 n^2 bytes, 0.5 GB for the 11,221 classes of fall11.

        Raises:
            UnknownSynsetError: The tree has no such node.
            InvalidArgumentError: ``nodes`` is not a list, or has no order.
        """
        given = range(len(self)) if nodes is None else ordered("nodes", nodes)
        chosen = np.array([self.index(node) for node in given], np.int64)
        common = np.zeros((len(chosen), len(chosen)), np.int32)  # number of common ancestors, a node's own included
        for column in self.ancestor_table[chosen].T:
            common += (column[:, None] == column) & (column >= 0)
        apart, depths = common == 0, self.depths[chosen]
        common *= -2
        common += depths[:, None] + 1
        common += depths + 1
        common[apart] = -1
        return common

    def search(self, query: str | int, limit: int | None = 20) -> tuple[Node, ...]:
        """Find nodes by an index, a wnid or (part of) a name, the best first.

        A whole lemma ranks before one in the singular, the beginning of one, a word inside one, and any other part, and
        a class's first lemma before its others; case, accents, hyphens, underscores and full stops are ignored, and of
        equal matches the shallower node comes first.

        Raises:
            InvalidArgumentError: The query is empty, or the limit not a whole number of at least 0.
        """
        limit = None if limit is None else whole_number("limit", limit, 0)
        text, forms = str(query).strip().casefold(), forms_of(str(query))
        if not forms[0]:
            raise InvalidArgumentError("Nothing to search for; give a name, a wnid or an index.")
        if text in self.label_space.index:
            return (self[text],)
        if text.isdecimal():
            index = int(text[:20])  # Python does not parse numbers of thousands of digits
            return (self[index],) if index < len(self) else ()
        ranked = []
        for index, name in enumerate(self.label_space.names):
            if (rank := match_rank(forms, name)) is not None:
                ranked.append((rank, int(self.depths[index]), index))
        return self._nodes([index for _, _, index in sorted(ranked)[:limit]])

    def difference(self, other: SemanticTree) -> TreeDifference:
        """How this tree differs from ``other``: classes, parents, order.

        Raises:
            InvalidArgumentError: ``other`` is not a tree.
        """
        if not isinstance(other, SemanticTree):
            raise InvalidArgumentError(
                f"{other!r:.100} is not a SemanticTree; SemanticTree.find finds one by its name."
            )
        mine, others = self._parent_wnids(), other._parent_wnids()
        return TreeDifference(
            only_left=tuple(wnid for wnid in self.wnids if wnid not in others),
            only_right=tuple(wnid for wnid in other.wnids if wnid not in mine),
            parents={
                wnid: (parent, others[wnid])
                for wnid, parent in mine.items()
                if wnid in others and others[wnid] != parent
            },
            same_order=self.wnids == other.wnids,
        )

    # Drawing

    to_rich, to_dot, to_dict = drawing.to_rich, drawing.to_dot, drawing.to_dict

    # Indices

    def child_indices(self, index: int) -> NDArray[np.int64]:
        """Indices of a node's children, ascending; shape [number of children]. -1 counts as the parent of the roots."""
        order, starts = self._children_by_parent
        return order[starts[index + 1] : starts[index + 2]]

    @functools.cached_property
    def _children_by_parent(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = np.argsort(self.parents, kind="stable")
        order.flags.writeable = False
        return order, np.searchsorted(self.parents[order], np.arange(-1, len(self) + 1))

    @functools.cached_property
    def _parent_list(self) -> list[int]:
        return cast(list[int], self.parents.tolist())

    def _nodes(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Node, ...]:
        return tuple(self[int(index)] for index in indices)

    def _parent_wnids(self) -> dict[str, str | None]:
        return {
            wnid: self.wnids[parent] if parent >= 0 else None
            for wnid, parent in zip(self.wnids, self._parent_list, strict=True)
        }


@functools.cache
def _load(full_name: str) -> SemanticTree:
    return SemanticTree.from_label_space(LabelSpace.load(full_name))


def _checked(parents: Any, num_classes: int) -> NDArray[np.int32]:
    try:
        found = np.array([operator.index(parent) for parent in parents], np.int64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = np.zeros(0, np.int64)
    if len(found) != num_classes:
        raise TreeError(f"parents are not {num_classes:,} whole numbers, one for each class.")
    if not ((found >= -1) & (found < num_classes)).all():
        raise TreeError(f"parents are indices, 0 to {num_classes - 1}, or -1 for a root.")
    return found.astype(np.int32)


def _depths(parents: NDArray[np.int32]) -> NDArray[np.int32]:
    depths = np.zeros(len(parents), dtype=np.int32)
    current = parents
    while (walking := current >= 0).any():
        depths += walking
        if depths.max() >= len(parents):
            raise TreeError("The tree has a cycle: some class is its own ancestor.")
        current = np.where(walking, parents[current], -1)
    return depths


def _parents_from_chains(chains: Sequence[Sequence[int]], num_classes: int, path: Path) -> NDArray[np.int32]:
    parents = np.full(num_classes, -1, dtype=np.int32)
    for index, chain in enumerate(chains):
        if not chain or chain[0] != index or not all(0 <= above < num_classes for above in chain):
            raise TreeError(f"{path}: entry {index} of class_tree_list does not begin with itself or leaves the list.")
        if len(chain) > 1:
            parents[index] = chain[1]
    for index, chain in enumerate(chains):
        expected = [index]
        while (above := int(parents[expected[-1]])) >= 0 and len(expected) <= len(chain):
            expected.append(above)
        if expected != list(chain):
            raise TreeError(f"{path}: entry {index} of class_tree_list contradicts the entries of its ancestors.")
    return parents


def _rebuilt(kind: type[SemanticTree], label_space: LabelSpace, parents: NDArray[np.int32], name: str) -> SemanticTree:
    return kind(label_space, parents, name=name)
