"""The README shows the program's real output."""

import re
from pathlib import Path

import pytest
from conftest import EMBEDDED
from typer.testing import CliRunner

from wn21k_zoo.cli.app import app
from wn21k_zoo.labels import LABEL_SPACE_ALIASES, LABEL_SPACES, LabelSpace
from wn21k_zoo.tree import SemanticTree

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
NUMBER = re.compile(r"\d\.\d\d")


def shown():
    block = re.search(
        r"<!-- output of: wn21k (.*?) -->\n```text\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL
    )
    return block[1].split(), block[2]


def stable(text):
    """Strip what may differ between machines: small runners-up and the figures themselves."""
    rows = [re.split(r" {2,}(?=\S+ \d\.\d\d)", line)[0] for line in text.splitlines()]
    return [NUMBER.sub("#", row).split() for row in rows if row.strip()]


def test_demo_output():
    arguments, expected = shown()
    found = CliRunner().invoke(app, arguments).stdout
    assert stable(found)[:5] == stable(expected)[:5]
    for ours, theirs in zip(NUMBER.findall(found)[:5], NUMBER.findall(expected)[:5], strict=True):
        assert float(ours) == pytest.approx(float(theirs), abs=0.03)
    assert EMBEDDED in expected


def test_label_space_table():
    text = README.read_text(encoding="utf-8")
    aliases = {full: f" (`{alias}`)" for alias, full in LABEL_SPACE_ALIASES.items()}
    for name in LABEL_SPACES:
        assert f"| `{name}`{aliases.get(name, '')} | {len(LabelSpace.load(name)):,} |" in text


def test_what_it_says_of_labels():
    text = " ".join(README.read_text(encoding="utf-8").split())
    fall11, winter21 = SemanticTree.load("fall11"), SemanticTree.load("winter21")
    people = {"n00007846", *(node.wnid for node in fall11.descendants("n00007846"))}
    assert f"{len(people)} of them are *person*" in text
    assert f"winter21 is without {len(people - {*winter21.wnids})} of these" in text
    for wnid, other in (("n02084071", "n01861778"), ("n02121808", "n01861778"), ("n02958343", "n04524313")):
        assert other in fall11
        assert other not in [node.wnid for node in fall11.ancestors(wnid)]
    for wnid in ("n02084071", "n02121808"):
        assert "n01317541" in [node.wnid for node in fall11.ancestors(wnid)]
    assert "n03094503" in [node.wnid for node in fall11.ancestors("n02958343")]
