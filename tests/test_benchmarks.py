"""The benchmarks can be imported. That of the engine also runs in tests/training, as a slow test."""

import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_needs_is_there(path):
    assert callable(runpy.run_path(str(path))["main"])
