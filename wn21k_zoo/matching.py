"""How what somebody types is matched with the names of classes."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

__all__ = ["folded", "forms_of", "match_rank"]

_PUNCTUATION = str.maketrans({"-": " ", "_": " ", ".": None, "\u2019": "'"})
# WordNet's rules of detachment for nouns, and -oes: https://wordnet.princeton.edu/documentation/morphy7wn
_PLURALS = {
    "s": "",
    "ses": "s",
    "xes": "x",
    "zes": "z",
    "ches": "ch",
    "shes": "sh",
    "men": "man",
    "ies": "y",
    "oes": "o",
}


def folded(text: str) -> str:
    """A name as names are compared: 'shih tzu' for 'Shih-Tzu', 'st bernard' for 'St. Bernard', 'cafe' for 'café'."""
    text = text.casefold().translate(_PUNCTUATION)
    if text.isascii():
        return text
    return "".join(each for each in unicodedata.normalize("NFKD", text) if not unicodedata.combining(each))


def forms_of(query: str) -> tuple[str, ...]:
    """What is searched for: the folded query itself, then what it may be the regular plural of."""
    text = " ".join(folded(query).split())
    singulars = (text.removesuffix(end) + rest for end, rest in _PLURALS.items() if text.endswith(end))
    return tuple(dict.fromkeys((text, *singulars)))


def match_rank(forms: Sequence[str], name: str) -> int | None:
    """How well a class's name, its lemmas, matches a query, 0 the best; None: not at all.

    Ranks: the first lemma; another one; the first in the singular; another one; the beginning of a lemma; of a word
    inside one; any other part of the name.
    """
    text, name = forms[0], folded(name)
    lemmas = name.split(", ")
    for rank, whole in ((0, forms[:1]), (2, forms[1:])):
        if any(each in lemmas for each in whole):
            return rank if lemmas[0] in whole else rank + 1
    if text not in name:
        return None
    if any(lemma.startswith(text) for lemma in lemmas):
        return 4
    return 5 if f" {text}" in name else 6
