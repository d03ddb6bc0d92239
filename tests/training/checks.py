"""Start runs in this process and check their results."""

import json
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
import torch

from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.engine import train
from wn21k_zoo.training.network import build_network
from wn21k_zoo.training.signals import Signals
from wn21k_zoo.training.state import RunFolder

from .runs import small_recipe

ALONE = World(0, 1, torch.device("cpu"))
# Moves weights far in a few steps, with an optimizer that does not amplify rounding as Adam's division does.
FAST = {"name": "sgd", "lr": 0.05}

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None or not Path(sysconfig.get_path("include"), "Python.h").is_file(),
    reason="torch.compile needs a C++ compiler and Python's headers",
)


def run(recipe, data, output, world=ALONE, **options):
    return train(recipe, data, output, world, workers=0, **options)


def run_told(recipe, data, output, world=ALONE, **options):
    """A run that listens to signals without letting them end this process."""
    signals = Signals(patience=300)
    with signals.listening():
        return run(recipe, data, output, world, signals=signals, **options)


def final(output):
    return RunFolder(output).newest()


def lines(output, kind="train"):
    return [
        line
        for text in (output / "metrics.jsonl").read_text().splitlines()
        if (line := json.loads(text))["kind"] == kind
    ]


def assert_same_weights(one, other):
    assert one["step"] == other["step"]
    for part in ("model", "average"):
        assert (one[part] is None) == (other[part] is None)
        for key, value in (one[part] or {}).items():
            assert torch.equal(value, other[part][key]), key


def assert_close_weights(one, other, atol=2e-6, recipe=None):
    """Assert weights equal up to rounding, after having moved far from their initial values."""
    begin = build_network(recipe or small_recipe(), "abcdef", None).state_dict()
    moved = max(float((begin[key] - value).abs().max()) for key, value in one["model"].items())
    assert moved > 1e-2
    for key, value in one["model"].items():
        found, named = other["model"][key], lambda text, key=key: f"{key}: {text}"
        torch.testing.assert_close(found, value, rtol=0, atol=atol, msg=named)
