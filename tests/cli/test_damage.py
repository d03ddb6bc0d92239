"""Truncated, swapped or overwritten files: a one-line message, or the rest is processed."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from training.runs import make_folder, small_recipe
from typer.testing import CliRunner

from wn21k_zoo.cli.app import app
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.engine import train
from wn21k_zoo.training.export import export_run
from wn21k_zoo.training.prepare import PrepareOptions, prepare

DAMAGES = {
    "empty": b"",
    "deep": b"[" * 100_000,
    "null": b"null",
    "text": b'"x"',
    "bytes": b"\xff\xfe\x00\xd8",
    "numpy": b"\x93NUMPY\x01\x00\x20\x00{'shape': (3,), 'descr': ('a',  \n",
}
FILES = {
    "run/recipe.json": ("train show run/recipe.json", "train plan run --images 99", "train export run out"),
    "run/metrics.jsonl": ("train plot run -o out.png", "train compare run"),
    "run/data.json": ("train compare run", "train export run out", "train plan run"),
    "run/status.json": ("train compare run",),
    "run/checkpoints/best.pt": ("train export run out",),
    "exported/config.json": (
        "info ./exported",
        "predict sample:cat -m ./exported",
        "publish exported --repo a/b --dry-run",
    ),
    "exported/model.safetensors": ("publish exported --repo a/b --dry-run", "predict sample:cat -m ./exported"),
    "shards/_info.json": ("data info shards", "data verify shards", "data show shards -o out.png"),
    "shards/manifest.parquet": ("data info shards", "data verify shards"),
    "shards/__index__/train-00000.npy": ("data verify shards", "data show shards -o out.png"),
    "shards/train-00000.tar": ("data verify shards", "data show shards -o out.png"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run, a model exported from it, and shards of the same images."""
    folder = tmp_path_factory.mktemp("whole")
    data = make_folder(folder / "images")
    train(small_recipe(schedule={"epochs": 1}), data, folder / "run", World(0, 1, torch.device("cpu")), workers=0)
    export_run(folder / "run", folder / "exported")
    prepare(data, folder / "shards", PrepareOptions(min_images=0, val_per_class=2, size=32), workers=1)
    shutil.rmtree(data)
    return folder


@pytest.fixture
def place(whole, tmp_path, monkeypatch):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_half_a_copied_weight_file_is_called_that(place):
    path = place / "exported" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "are damaged or incomplete" in check("predict sample:cat -m ./exported").stderr


def check(command):
    done = CliRunner().invoke(app, command.split())
    assert done.exit_code in (0, 1, 2, 3), command
    assert "wn21k: unexpected" not in done.stderr, command
    assert "Traceback" not in done.stderr, command
    if done.exit_code:
        assert done.stderr or done.stdout, command  # `data verify` reports on stdout
        said = [line for line in done.stderr.splitlines() if "━" not in line]  # skips progress bars
        assert all(line.startswith("wn21k: ") for line in said), done.stderr
    return done


def broken(content):
    """Variants of some JSON with each value removed or replaced, at the top level and one below."""
    for key in content:
        yield {other: value for other, value in content.items() if other != key}
        for wrong in (None, -1, "x", [None], {"a": 1}):
            yield {**content, key: wrong}
        if isinstance(content[key], dict):
            yield from (
                {**content, key: {**content[key], below: wrong}} for below in content[key] for wrong in ([], {})
            )


def test_what_is_whole_is_read(place):
    for command in {command for commands in FILES.values() for command in commands}:
        done = check(f"{command} --force" if command == "train export run out" else command)
        assert done.exit_code == 0, (command, done.stderr)


@pytest.mark.parametrize("kinds", [("empty", "null"), pytest.param(tuple(DAMAGES), marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_one_line(place, file, kinds):
    before = (place / file).read_bytes()
    more = (before[:-1], bytes(len(before))) if len(kinds) > 2 else ()
    for damage in (*(DAMAGES[kind] for kind in kinds), before[: len(before) // 2], *more):
        (place / file).write_bytes(damage)
        for command in FILES[file]:
            check(command)
            shutil.rmtree("out", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", [file for file in FILES if file.endswith(".json")])
def test_a_wrong_value_is_one_line(place, file):
    commands = itertools.cycle(FILES[file])  # of six wrong values of each key, every command meets some
    for content, command in zip(broken(json.loads((place / file).read_text())), commands, strict=False):
        (place / file).write_text(json.dumps(content))
        check(command)
        shutil.rmtree("out", ignore_errors=True)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_flipped_bytes_are_one_line(place, file):
    before, random = (place / file).read_bytes(), np.random.default_rng(0)
    for _ in range(8):
        damaged = bytearray(before)
        for position in random.integers(0, len(before), 5):
            damaged[position] = random.integers(256)
        (place / file).write_bytes(damaged)
        for command in FILES[file]:
            check(command)
            shutil.rmtree("out", ignore_errors=True)
