from pathlib import Path

import pytest

from wn21k_zoo.errors import TreeError
from wn21k_zoo.tree import SemanticTree
from wn21k_zoo.wordnet import LEXNAMES, compile_data, packaged_data

DEBIAN = Path("/usr/share/wordnet")
README = Path(__file__).parents[1] / "README.md"


def test_lexnames():
    assert len(LEXNAMES) == 45
    assert LEXNAMES[3] == "noun.Tops"
    assert LEXNAMES[44] == "adj.ppl"


def test_no_wordnet(tmp_path):
    with pytest.raises(TreeError, match=r"data\.noun"):
        compile_data(tmp_path)
    (tmp_path / "data.noun").write_text("no WordNet")
    with pytest.raises(TreeError):
        compile_data(tmp_path)
    assert packaged_data("nothing.txt") is None


@pytest.mark.skipif(not (DEBIAN / "data.noun").is_file(), reason="no Debian package wordnet-base")
def test_one_class_in_eight_lacks_an_ancestor_as_the_readme_says():
    above = {}
    for line in (DEBIAN / "data.noun").read_text(encoding="ascii").splitlines():
        if line[:1].isdigit():
            offset, _, _, num_words, *rest = line.partition(" | ")[0].split()
            pointers = rest[2 * int(num_words, 16) + 1 :]
            kinds = zip(pointers[::4], pointers[1::4], strict=False)
            above[f"n{offset}"] = [f"n{target}" for kind, target in kinds if kind == "@"]

    def ancestors(wnid):
        return {found for parent in above[wnid] for found in (parent, *ancestors(parent))}

    fall11 = SemanticTree.load("fall11")
    classes = set(fall11.wnids)
    lacking = [
        wnid for wnid in fall11.wnids if (ancestors(wnid) & classes) - {node.wnid for node in fall11.ancestors(wnid)}
    ]
    assert round(len(fall11) / len(lacking)) == 8
    assert "one class in eight lacks such an ancestor" in README.read_text(encoding="utf-8")
