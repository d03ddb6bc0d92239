import shutil
from types import SimpleNamespace

import pytest
import torch

from wn21k_zoo.training.announce import announcements
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.splits import open_splits

from .runs import make_folder, small_recipe

GPUS = World(0, 2, torch.device("cuda", 0))


@pytest.fixture
def told(data, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)

    def tell(world=GPUS, layout=None, step=3, **sections):
        recipe = small_recipe(**sections)
        learner = SimpleNamespace(module=torch.nn.Linear(2, 2), about_teacher="")
        layout = layout or [world.size, recipe.micro_batches(world.size)[0]]
        first, *others = announcements(recipe, open_splits(recipe, data), world, learner, step, 12, 5, layout)
        assert first.startswith("small: 54 images for training, 6 for validation, 6 classes (1 without")
        return others

    return tell


def test_what_is_as_it_should_be_is_not_told(told, monkeypatch):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    assert told() == []
    assert told(World(0, 1, torch.device("cpu")), run={"deterministic": True}) == []
    assert told(World(0, 1, torch.device("cuda", 0)), model={"compile": True, "sync_batchnorm": True}) == []


def test_what_may_not_be_meant_is_told(told):
    (line,) = told(model={"compile": True, "sync_batchnorm": True})
    assert "model.compile gains little" in line
    (line,) = told(layout=[1, 8])
    assert line.startswith("the run used 1 processes with 8 images at a time, and resumes in 2 with 4")
    assert [line for line in told(step=0) if "run.precision=bf16" in line]


@pytest.mark.parametrize("divided", [False, True])
def test_files_that_nobody_reads_are_told(tmp_path, divided):
    images = make_folder(tmp_path / "images")
    if divided:
        shutil.copytree(images, tmp_path / "divided" / "train")
        images = shutil.copytree(images, tmp_path / "divided" / "val").parent
    for number, name in enumerate(("a.CR2", "b.cr2", "notes.txt", "README", ".hidden", "._c.cr2")):
        each = sorted(path for path in images.rglob("*") if path.is_dir() and not any(path.glob("*/")))
        (each[number % len(each)] / name).touch()
    recipe = small_recipe()
    learner = SimpleNamespace(module=torch.nn.Linear(2, 2), about_teacher="")
    splits, alone = open_splits(recipe, images), World(0, 1, torch.device("cpu"))
    _, line = announcements(recipe, splits, alone, learner, 3, 12, 6, [1, recipe.micro_batches(1)[0]])
    assert line.startswith("4 files are skipped")
    assert "(.cr2, " in line


def test_sums_over_gpus_that_may_differ_are_told(told, monkeypatch):
    monkeypatch.delenv("NCCL_ALGO", raising=False)
    (line,) = told(run={"deterministic": True})
    assert "NCCL_ALGO=^NVLS,NVLSTree" in line
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    assert told(run={"deterministic": True}) == []
