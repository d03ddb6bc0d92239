import json

import pytest
from rich.console import Console

from wn21k_zoo import SemanticTree
from wn21k_zoo.errors import InvalidArgumentError


@pytest.fixture(scope="module")
def pets():
    return SemanticTree.from_wnids(["n02121808", "n02123045", "n02084071", "n02123597"], name="pets")


def test_rich(pets):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(pets.to_rich())
    assert "tabby" in captured.get()
    with console.capture() as captured:
        console.print(pets.to_rich(max_depth=1))
    assert "tabby" not in captured.get()
    assert "domestic cat" in captured.get()


def test_dot(pets):
    text = pets.to_dot()
    assert text.startswith('digraph "pets" {')
    assert "n02121808 -> n02123045;" in text
    assert "->" not in pets.to_dot(max_depth=1)
    assert pets.to_dot("n02121808").count("[label") == 3


def test_dict_is_json_and_nested(pets):
    roots = json.loads(json.dumps(pets.to_dict()))
    assert [root["wnid"] for root in roots] == ["n02121808", "n02084071"]
    assert [child["wnid"] for child in roots[0]["children"]] == ["n02123045", "n02123597"]
    assert pets.to_dict("n02121808", 0)[0]["children"] == []


def test_nothing_is_drawn_below_no_level(pets):
    console = Console(width=100)
    with console.capture() as captured:
        console.print(pets.to_rich(max_depth=0))
    assert captured.get() == "pets · 4 classes, 2 roots\n"
    assert "label=" not in pets.to_dot(max_depth=0)
    assert pets.to_dict(max_depth=0) == []


def test_negative_depth(pets):
    for draw in (pets.to_rich, pets.to_dot, pets.to_dict):
        with pytest.raises(InvalidArgumentError):
            draw(max_depth=-1)
