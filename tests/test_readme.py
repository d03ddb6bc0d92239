"""The README shows the program's real output."""

import re
from pathlib import Path

import pytest
from conftest import EMBEDDED
from typer.testing import CliRunner

from wn21k_zoo.cli.app import app
from wn21k_zoo.labels import LABEL_SPACE_ALIASES, LABEL_SPACES, LabelSpace

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
