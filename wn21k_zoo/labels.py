"""Label spaces: which class each output of a classifier's head stands for.

The shipped lists are timm's (``timm/data/_info``), in their published order. A class is identified by its wnid; a name
or a class count is never enough: 482 of the 11,221 classes of ImageNet-21K-P share their name with another one.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, KeysView, Mapping, Sequence, Set
from dataclasses import dataclass, field
from importlib import resources
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.errors import (
    DuplicateSynsetError,
    EmptyLabelSpaceError,
    InvalidArgumentError,
    LabelSpaceError,
    UnknownLabelSpaceError,
    did_you_mean,
    first_line,
)
from wn21k_zoo.files import expanded, text_of
from wn21k_zoo.synsets import load_nouns

__all__ = ["LABEL_SPACES", "LABEL_SPACE_ALIASES", "ClassNames", "LabelSpace", "ordered"]

LABEL_SPACES: Mapping[str, str] = MappingProxyType(
    {
        "imagenet1k": "ImageNet-1K (ILSVRC 2012), 1,000 classes",
        "imagenet12k": "timm's 12K subset of ImageNet-22K, 11,821 classes",
        "imagenet21k_goog": "ImageNet-21K as Google's models have it, 21,843 classes",
        "imagenet22k": "ImageNet-22K, all of the fall 2011 release, 21,841 classes",
        "imagenet22k_ms": "ImageNet-22K with the 1,000 classes of ImageNet-1K first, 21,842 classes",
        "imagenet21k_p_fall11": "ImageNet-21K-P of the fall 2011 release, 11,221 classes",
        "imagenet21k_p_winter21": "ImageNet-21K-P of the winter 2021 release, 10,450 classes",
    }
)
LABEL_SPACE_ALIASES: Mapping[str, str] = MappingProxyType(
    {"fall11": "imagenet21k_p_fall11", "winter21": "imagenet21k_p_winter21"}
)


@dataclass(frozen=True, repr=False)
class LabelSpace:
    """An ordered list of WordNet noun synsets, one for each output of a head.

    Args:
        name: A name for messages and results.
        wnids: WordNet 3.0 noun ids in the order of the outputs; any sequence is converted to a tuple.

    Raises:
        InvalidArgumentError: ``wnids`` is not a list, or has no order.
        EmptyLabelSpaceError: There is no class.
        DuplicateSynsetError: A wnid appears twice.
        UnknownSynsetError: A wnid is not a noun synset of WordNet 3.0.

    Example:
        >>> LabelSpace.load("imagenet1k").names[281]
        'tabby, tabby cat'
    """

    name: str
    wnids: tuple[str, ...]
    positions: NDArray[np.int64] = field(init=False, repr=False, compare=False)
    """Position of each class in :class:`wn21k_zoo.synsets.Nouns`, shape [len(self)]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "wnids", ordered("wnids", self.wnids))
        object.__setattr__(self, "positions", _checked_positions(self.wnids))

    @staticmethod
    def load(name: str) -> LabelSpace:
        """Load a shipped label space by its name or alias (:data:`LABEL_SPACES`, :data:`LABEL_SPACE_ALIASES`).

        Raises:
            UnknownLabelSpaceError: No label space has that name.
        """
        full_name = LABEL_SPACE_ALIASES.get(name, name)
        if full_name not in LABEL_SPACES:
            hint = did_you_mean(str(name), (*LABEL_SPACES, *LABEL_SPACE_ALIASES))
            known = ", ".join((*LABEL_SPACES, *LABEL_SPACE_ALIASES))
            raise UnknownLabelSpaceError(f"No label space is called {name!r}.{hint} Known: {known}.")
        return _load(full_name)

    @staticmethod
    def from_file(path: str | os.PathLike[str], *, name: str = "custom") -> LabelSpace:
        """Read a text file of wnids: the first word of each line; '#' begins a comment.

        Raises:
            LabelSpaceError: The file cannot be read as text; subclasses as for this class.
            UnknownSynsetError: A word is not a noun synset of WordNet 3.0.
        """
        try:
            lines = text_of(expanded(path, LabelSpaceError).read_bytes()).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise LabelSpaceError(f"{path} cannot be read as a list of wnids ({first_line(error)}).") from error
        words = (line.split("#")[0].split() for line in lines)
        return LabelSpace(name, tuple(line[0] for line in words if line))

    @staticmethod
    def find(name: str | os.PathLike[str] | LabelSpace | Sequence[str]) -> LabelSpace:
        """Find a shipped label space by its name or alias, or else read a text file.

        A label space is returned as is, and so is that of a :class:`~wn21k_zoo.tree.SemanticTree`; other sequences are
        wnids in the order of the outputs.

        Raises:
            UnknownLabelSpaceError: Neither has that name.
            LabelSpaceError, UnknownSynsetError: As :meth:`from_file`.
            InvalidArgumentError: It is neither a name nor a sequence.
        """
        of_a_tree = getattr(name, "label_space", name)
        if isinstance(of_a_tree, LabelSpace):
            return of_a_tree
        if not isinstance(name, (str, os.PathLike)):
            return LabelSpace("custom", ordered("label_space", name))
        name = os.fspath(name)
        if name not in LABEL_SPACES and name not in LABEL_SPACE_ALIASES:
            path = expanded(name, UnknownLabelSpaceError)
            if path.is_file():
                return LabelSpace.from_file(path)
        try:
            return LabelSpace.load(name)
        except UnknownLabelSpaceError as error:
            raise UnknownLabelSpaceError(f"{error} Or name a text file of wnids.") from None

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The lemmas of each class, joined by ', '; not unique."""
        names = load_nouns().names
        return tuple(names[position] for position in self.positions)

    @functools.cached_property
    def unique_names(self) -> tuple[str, ...]:
        """As :attr:`names`, with the wnid appended where several classes have the same name."""
        count = Counter(self.names)
        pairs = zip(self.names, self.wnids, strict=True)
        return tuple(f"{name} ({wnid})" if count[name] > 1 else name for name, wnid in pairs)

    @functools.cached_property
    def definitions(self) -> tuple[str, ...]:
        """WordNet's definition of each class."""
        definitions = load_nouns().definitions
        return tuple(definitions[position] for position in self.positions)

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the wnids, one per line, in hexadecimal: equal digests mean the same outputs in the same order."""
        return hashlib.sha256("".join(f"{wnid}\n" for wnid in self.wnids).encode()).hexdigest()

    @property
    def is_shipped(self) -> bool:
        """Whether :meth:`load` returns the same classes under this name."""
        return self.name in LABEL_SPACES and self.wnids == _load(self.name).wnids

    @functools.cached_property
    def index(self) -> Mapping[str, int]:
        """Output index of each wnid."""
        return MappingProxyType({wnid: index for index, wnid in enumerate(self.wnids)})

    def __reduce__(self) -> tuple[Callable[..., LabelSpace], tuple[Any, ...]]:
        if self.is_shipped:
            return _load, (self.name,)
        return LabelSpace, (self.name, self.wnids)  # everything else is derived from these

    def __len__(self) -> int:
        return len(self.wnids)

    def __iter__(self) -> Iterator[str]:
        return iter(self.wnids)

    def __getitem__(self, index: int) -> str:
        return self.wnids[index]

    def __contains__(self, wnid: object) -> bool:
        return wnid in self.index

    def __repr__(self) -> str:
        return f"LabelSpace({self.name!r}, {len(self):,} classes)"


@dataclass(frozen=True, repr=False)
class ClassNames:
    """Classes that are not WordNet synsets, one for each output of a head, as a network fine-tuned on folders has.

    Nothing but their names is known: no class is above another one. Outputs are read as one softmax unless ``head``
    says ``sigmoid``.

    Args:
        names: Names in the order of the outputs; any sequence is converted to a tuple.
        name: Name of the list of classes in results.

    Raises:
        EmptyLabelSpaceError: There is no class.
        InvalidArgumentError: ``names`` is not a list of strings, or has no order.

    Example:
        >>> ClassNames(["healthy", "rust", "scab"])
        ClassNames('own', 3 classes)
    """

    names: Sequence[str]
    name: str = "own"

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise InvalidArgumentError("names is a str; give a list of class names, and then a name for the list.")
        object.__setattr__(self, "names", ordered("names", self.names))
        if not self.names:
            raise EmptyLabelSpaceError("The list of classes is empty; give at least one name.")
        for name in (self.name, *self.names):
            if not isinstance(name, str):
                raise InvalidArgumentError(f"{name!r} is not a class name; give strings.")

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __getitem__(self, index: int) -> str:
        return self.names[index]

    def __repr__(self) -> str:
        return f"ClassNames({self.name!r}, {len(self):,} classes)"


def ordered(name: str, classes: Iterable[Any]) -> tuple[Any, ...]:
    """Return the classes of an argument as a tuple.

    Raises:
        InvalidArgumentError: They are one string, or nothing says which output each stands for.
    """
    if isinstance(classes, Mapping):
        by_index = all(isinstance(key, int) for key in classes)  # as id2label of transformers
        how = (
            "[id2label[i] for i in range(len(id2label))]" if by_index else "sorted(class_to_idx, key=class_to_idx.get)"
        )
        raise InvalidArgumentError(
            f"{name} is a {type(classes).__name__}; give a list in the order of the outputs, such as {how}."
        )
    has_no_order = isinstance(classes, Set) and not isinstance(classes, KeysView)
    if isinstance(classes, str) or has_no_order or not isinstance(classes, Iterable):
        raise InvalidArgumentError(
            f"{name} is a {type(classes).__name__}; give a list, with a class for each output in their order."
        )
    return tuple(classes)


@functools.cache
def _load(full_name: str) -> LabelSpace:
    file = resources.files("wn21k_zoo") / "_data" / "label_spaces" / f"{full_name}.txt"
    return LabelSpace(full_name, tuple(file.read_text(encoding="ascii").split()))


def _checked_positions(wnids: tuple[str, ...]) -> NDArray[np.int64]:
    if not wnids:
        raise EmptyLabelSpaceError("The list of classes is empty; give at least one wnid.")
    positions = load_nouns().positions(wnids)
    _, first = np.unique(positions, return_index=True)
    if len(first) < len(wnids):
        again = wnids[np.setdiff1d(np.arange(len(wnids)), first)[0]]
        raise DuplicateSynsetError(f"{again} appears more than once in the list of classes; keep one of them.")
    positions.flags.writeable = False
    return positions
