"""The noun synsets of WordNet 3.0: primary parent, lemmas and definition of each.

Label spaces and trees are lists of these. The table is compiled by ``wn21k tree build`` (:mod:`wn21k_zoo.wordnet`) and
shipped as a plain array and two text files; the texts are read when first needed.

A wnid is ``n`` and the eight digits of a synset's offset in WordNet 3.0's ``data.noun``, as ImageNet writes it. The
primary parent is the hypernym listed last in ImageNet's ``wordnet.is_a.txt``, the one that the published
ImageNet-21K-P tree uses (arXiv 2104.10972, section 3.2); instance hypernyms are not followed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.errors import UnknownSynsetError

__all__ = ["WNID_PATTERN", "Nouns", "load_nouns"]

WNID_PATTERN = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Nouns:
    """All 82,115 noun synsets, in the order of their offsets.

    Attributes:
        offsets: Offset of each synset in ``data.noun``, shape [82115], ascending.
        parents: Position of each synset's primary parent in this table, or -1, shape [82115].
    """

    offsets: NDArray[np.int32]
    parents: NDArray[np.int32]

    @functools.cached_property
    def names(self) -> Sequence[str]:
        """The lemmas of each synset, joined by ', ' ('domestic cat, house cat, Felis domesticus, Felis catus')."""
        return _read_lines("lemmas.txt")

    @functools.cached_property
    def definitions(self) -> Sequence[str]:
        """WordNet's definition of each synset, without the examples."""
        return _read_lines("definitions.txt")

    def positions(self, wnids: Sequence[str]) -> NDArray[np.int64]:
        """Positions of ``wnids`` in this table, shape [len(wnids)].

        Raises:
            UnknownSynsetError: An entry is not a noun synset of WordNet 3.0.
        """
        for wnid in wnids:
            if not isinstance(wnid, str) or not WNID_PATTERN.fullmatch(wnid):
                raise _unknown(wnid)
        offsets = np.array([int(wnid[1:]) for wnid in wnids], dtype=np.int64)
        positions = np.searchsorted(self.offsets, offsets)
        found = self.offsets[np.minimum(positions, len(self.offsets) - 1)] == offsets
        if not found.all():
            raise _unknown(wnids[int(np.argmin(found))])
        return positions

    def nearest_members(self, start: NDArray[np.int64], members: NDArray[np.int64]) -> NDArray[np.int32]:
        """For each position in ``start``, find the index in ``members`` of it or else its nearest ancestor there.

        Args:
            start: Positions in this table, shape [N]; -1 is allowed and has no ancestors.
            members: Positions in this table, shape [M], each once.

        Returns:
            Indices into ``members``, -1 where the walk to the root meets none, shape [N].
        """
        index_of = np.full(len(self.offsets) + 1, -1, dtype=np.int32)  # the last entry answers for position -1
        index_of[members] = np.arange(len(members), dtype=np.int32)
        current = np.array(start, dtype=np.int64)
        found = index_of[current]
        while True:
            walking = (found < 0) & (current >= 0)
            if not walking.any():
                return found
            current[walking] = self.parents[current[walking]]
            found = index_of[current]


@functools.cache
def load_nouns() -> Nouns:
    """Return the shipped table; it is read once per process."""
    with (resources.files("wn21k_zoo") / "_data" / "nouns.npy").open("rb") as file:
        offsets, parents = np.load(file, allow_pickle=False)
    return Nouns(offsets=offsets, parents=parents)


def _read_lines(name: str) -> list[str]:
    return (resources.files("wn21k_zoo") / "_data" / name).read_text(encoding="utf-8").split("\n")[:-1]


def _unknown(wnid: Any) -> UnknownSynsetError:
    return UnknownSynsetError(
        f"{wnid!r} is not a noun synset of WordNet 3.0; a wnid is 'n' and eight digits: n02121808 is domestic cat."
    )
