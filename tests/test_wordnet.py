from pathlib import Path

import pytest

from wn21k_zoo.errors import TreeError
from wn21k_zoo.wordnet import LEXNAMES, compile_data, packaged_data

DEBIAN = Path("/usr/share/wordnet")


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
