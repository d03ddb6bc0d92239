import contextlib
import io
import math
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from wn21k_zoo.errors import RecipeError, RunError
from wn21k_zoo.training import engine
from wn21k_zoo.training.algorithms import choose_algorithms, is_deterministic, torch_as_it_was
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.engine import Preempted
from wn21k_zoo.training.network import build_network
from wn21k_zoo.training.state import RunFolder

from .checks import FAST, assert_close_weights, assert_same_weights, final, lines, run, run_told
from .runs import (
    BATCH,
    make_folder,
    small_recipe,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_leaves_what_it_should(data, tmp_path):
    begin = time.perf_counter()
    figures = run(small_recipe(), data, tmp_path / "run")
    assert figures["images"] / figures["images_per_second"] < time.perf_counter() - begin
    folder = RunFolder(tmp_path / "run")
    assert folder.status() == {"state": "finished", "step": 12, "total": 12}
    assert folder.recipe() == small_recipe()
    assert [line["step"] for line in lines(tmp_path / "run")] == list(range(1, 13))
    evaluations = lines(tmp_path / "run", "evaluation")
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(6, 1), (12, 2)]
    assert evaluations[-1]["images"] == figures["images"] == 6
    assert {path.name for path in folder.checkpoints.iterdir()} == {"best.pt", "step-00000006.pt", "step-00000012.pt"}
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run"))
    assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_on_a_terminal_it_has_a_bar(data, tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")  # the bar is what becomes shorter
    run(small_recipe(schedule={"epochs": 1}), data, tmp_path)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "6/6" in shown
    assert re.search(r"6/6  \d:\d\d:\d\d left  loss \d.*images/s  data \d+%", shown)
    assert "wn21k: epoch 1  semantic_top1" in shown
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")  # the cursor is back


def test_what_is_left_open_is_as_the_images_need(data, tmp_path):
    recipe = small_recipe(schedule={"epochs": None, "max_steps": 25}, run={"evaluate_every": None})
    run(recipe, data, tmp_path)
    resolved = RunFolder(tmp_path).recipe()
    assert (resolved.schedule.epochs, resolved.run.evaluate_every) == (5, 1)  # of 6 steps each
    run(small_recipe(schedule={"epochs": 3}, run={"evaluate_every": None}), data, tmp_path / "short")
    assert [line["step"] for line in lines(tmp_path / "short", "evaluation")] == [6, 12, 18]


def test_it_learns(data, tmp_path):
    recipe = small_recipe(schedule={"epochs": 12}, optimizer={"lr": 3e-3}, data={"augmentation": "none"})
    figures = run(recipe, data, tmp_path)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert figures["semantic_top1"] == 100
    assert figures["levels"] == {0: 100, 1: 100}


def test_accumulation_equals_one_large_batch_to_rounding(data, tmp_path):
    for size in (BATCH, 2):
        run(small_recipe(data={"batch_per_device": size}, optimizer=FAST), data, tmp_path / str(size))
    assert_close_weights(final(tmp_path / str(BATCH)), final(tmp_path / "2"))


def test_classes_that_are_no_synsets_have_a_plain_softmax_only(tmp_path):
    folder = make_folder(tmp_path / "images", names=("cats", "dogs"), images=12)
    with pytest.raises(RecipeError, match=r"needs classes that are synsets, and .* has 'cats'"):
        run(small_recipe(), folder, tmp_path / "run")
    figures = run(small_recipe(loss={"kind": "single_label"}), folder, tmp_path / "run")
    assert "semantic_top1" not in figures
    assert figures["images"] == 2


@pytest.mark.parametrize("kind", ["single_label", "multi_label"])
def test_baselines_run(data, tmp_path, kind):
    smoothing = 0.2 if kind == "single_label" else 0.0
    figures = run(small_recipe(loss={"kind": kind, "label_smoothing": smoothing}), data, tmp_path)
    assert 0 <= figures["semantic_top1"] <= 100


@pytest.mark.parametrize("name", ["adam", "adamw", "lamb", "sgd"])
@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_every_optimizer_and_schedule(data, tmp_path, name, schedule):
    recipe = small_recipe(optimizer={"name": name, "head_lr_factor": 2.0}, schedule={"name": schedule, "max_steps": 4})
    run(recipe, data, tmp_path)
    rates = [line["lr"] for line in lines(tmp_path)]
    assert len(rates) == 4
    assert all(0 < rate <= 2 * recipe.optimizer.lr * 1.0001 for rate in rates)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision(data, tmp_path, at_loss, precision):
    seen = set()
    at_loss(lambda logits, _: seen.add(logits.dtype) or logits)
    run(small_recipe(run={"precision": precision}, schedule={"max_steps": 2}), data, tmp_path)
    assert seen == {{"bf16": torch.bfloat16, "fp16": torch.float16}[precision]}
    weights = [value for value in final(tmp_path)["model"].values() if value.is_floating_point()]
    assert {value.dtype for value in weights} == {torch.float32}


def test_it_runs_in_other_threads(data, tmp_path):
    with ThreadPoolExecutor(1) as threads:
        threads.submit(run, small_recipe(schedule={"max_steps": 1}), data, tmp_path).result()
    assert final(tmp_path)["step"] == 1


def test_deterministic_is_more_than_a_warning(data, tmp_path, at_loss):
    seen = []
    at_loss(lambda logits, number: seen.append(is_deterministic()) or logits)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        run(small_recipe(run={"deterministic": True}, schedule={"max_steps": 1}), data, tmp_path)
        assert seen == [(True, False)]
        assert is_deterministic() == (True, True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("deterministic", [True, False])
def test_cublas_can_be_deterministic_after_any_run(monkeypatch, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with torch_as_it_was(torch.device("cpu")):
        choose_algorithms(deterministic)
    assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


@pytest.mark.parametrize("deterministic", [True, False])
def test_what_is_torchs_is_afterwards_as_it_was(data, tmp_path, deterministic, monkeypatch, at_loss):
    filled = []
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    memory = torch.utils.deterministic
    assert memory.fill_uninitialized_memory
    at_loss(lambda logits, number: filled.append(memory.fill_uninitialized_memory) or logits)
    torch.use_deterministic_algorithms(deterministic)
    try:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        run(small_recipe(run={"deterministic": not deterministic}, schedule={"max_steps": 1}), data, tmp_path)
        assert torch.equal(torch.rand(4), expected)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark == deterministic
        assert (filled, memory.fill_uninitialized_memory) == ([False], True)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu(data, tmp_path, stop_at, precision):
    gpu = World(0, 1, torch.device("cuda", 0))
    recipe = small_recipe(run={"precision": precision, "ema_decay": 0.9}, optimizer={"clip_norm": 1.0})
    stop_at(7)
    with pytest.raises(Preempted):
        run_told(recipe, data, tmp_path, gpu)
    stop_at(-1)
    figures = run(recipe, data, tmp_path, gpu)
    assert figures["images"] == 6
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path))


def test_on_a_cpu_the_precision_of_products_is_a_program_s_own(data, tmp_path, monkeypatch):
    def asked(*_):
        raise RuntimeError("as torch does where a program chose by its newer settings")

    monkeypatch.setattr(torch, "get_float32_matmul_precision", asked)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked)
    assert run(small_recipe(schedule={"epochs": 1}), data, tmp_path)["images"] == 6


def test_from_python_a_process_alone_is_its_world(data, tmp_path):
    figures = engine.train(small_recipe(), data, tmp_path, workers=0)
    assert figures["images"] == 6
    assert engine.train(small_recipe(), data, tmp_path, workers=0) == figures  # finished before


@pytest.mark.parametrize("architecture", ["test_efficientnet", pytest.param("test_vit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("images", [BATCH, 4], ids=["whole", "accumulated"])
def test_gradient_checkpointing_changes_no_bit(data, tmp_path, architecture, images):
    recipe = small_recipe(architecture, data={"batch_per_device": images})
    recipe.run.ema_decay = 0.9
    if architecture == "test_vit":
        recipe.model.arguments = {"img_size": 32}
    for checkpointing in (False, True):
        recipe.model.gradient_checkpointing = checkpointing
        run(recipe, data, tmp_path / str(checkpointing))
    assert_same_weights(final(tmp_path / "False"), final(tmp_path / "True"))


def test_an_architecture_without_gradient_checkpointing(data, tmp_path):
    recipe = small_recipe("inception_v3", model={"gradient_checkpointing": True})
    with pytest.raises(RecipeError, match="inception_v3 has no gradient checkpointing"):
        run(recipe, data, tmp_path / "run")


def test_classes_above_each_other_are_for_one_softmax(tmp_path):
    data = make_folder(tmp_path / "images", names=("n02121808", "n02123045"), images=12)
    with pytest.raises(RecipeError, match=r"set loss\.kind to single_label"):
        run(small_recipe(), data, tmp_path / "run")
    figures = run(small_recipe(loss={"kind": "single_label"}), data, tmp_path / "run")
    assert 0 <= figures["top1"] <= 100


def test_evaluations_and_lines_are_as_often_as_asked_for(data, tmp_path):
    run(small_recipe(schedule={"epochs": 3}, run={"evaluate_every": 2, "log_every": 50}), data, tmp_path)
    assert [line["step"] for line in lines(tmp_path, "evaluation")] == [12, 18]
    assert [line["step"] for line in lines(tmp_path)] == [6, 12, 18]  # at least one an epoch


def test_randomness_in_the_network_is_of_seed_step_part_and_rank(data, tmp_path, monkeypatch):
    seeds = []
    monkeypatch.setattr(engine, "_seed", lambda *numbers: seeds.append(numbers) or 0)
    run(small_recipe(data={"batch_per_device": 4}, run={"seed": 9}, schedule={"epochs": 1}), data, tmp_path)
    assert seeds == [(9, step, part, 0) for step in range(6) for part in range(2)]
    monkeypatch.undo()
    assert len({engine._seed(*numbers) for numbers in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1))}) == 4


def test_the_generators_of_the_cpu_and_of_the_device_are_seeded(monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(4)
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    for kind in ("cpu", "cuda"):
        engine._set_seed(torch.device(kind), 3)
        assert torch.equal(torch.rand(4), expected)
    assert seeded == [3]


def test_a_runs_gpu_is_the_current_one_within(data, tmp_path, monkeypatch):
    # In a program's own process group it may be another one; seeds and pinned memory are those of the current one.
    entered = []

    @contextlib.contextmanager
    def watched(device):
        entered.append(device)
        yield
        entered.clear()

    def settings(_):
        raise RunError(f"current: {entered}")

    monkeypatch.setattr(torch.cuda, "device", watched)
    monkeypatch.setattr(engine, "torch_as_it_was", settings)
    for device, expected in (("cuda:1", "device(type='cuda', index=1)"), ("cpu", "")):
        entered.clear()
        with pytest.raises(RunError, match=re.escape(f"current: [{expected}]")):
            run(small_recipe(), data, tmp_path, World(0, 1, torch.device(device)))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluations_compute_in_the_precision_of_the_recipe(data, tmp_path, monkeypatch, precision):
    kinds, update = set(), engine.Evaluation.update

    def watched(self, logits, targets):
        kinds.add(logits.dtype)
        update(self, logits, targets)

    monkeypatch.setattr(engine.Evaluation, "update", watched)
    run(small_recipe(run={"precision": precision}, schedule={"max_steps": 1}), data, tmp_path)
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}


def test_class_folders_named_by_wnids_take_the_classes_of_a_label_space(tmp_path, capsys):
    data = make_folder(tmp_path / "images", names=("n01443537", "n02123045", "n02099601"), images=12)
    recipe = small_recipe(data={"label_space": "imagenet1k"}, loss={"kind": "single_label"})
    figures = run(recipe, data, tmp_path / "run")
    assert figures["classes_with_images"] == 3
    assert (
        "1,000 classes (997 without images for training, 997 without images for validation)" in capsys.readouterr().err
    )
    assert final(tmp_path / "run")["model"]["head.fc.weight"].shape[0] == 1000


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_gradient_is_clipped(data, tmp_path, precision):
    recipe = small_recipe(optimizer={"name": "sgd", "lr": 1.0, "clip_norm": 1e-4, "momentum": 0.0, "weight_decay": 0.0})
    recipe.schedule.name, recipe.schedule.warmup, recipe.schedule.max_steps = "constant", 0.0, 1
    recipe.run.precision = precision
    run(recipe, data, tmp_path)
    begin = build_network(recipe, "abcdef", None).state_dict()
    moved = sum(float(((begin[key] - value) ** 2).sum()) for key, value in final(tmp_path)["model"].items())
    assert math.sqrt(moved) == pytest.approx(1e-4, rel=0.05)


def test_a_folder_in_which_a_run_cannot_begin_is_told(data, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").mkdir(parents=True)
    with pytest.raises(RunError, match="directory"):
        run(small_recipe(), data, tmp_path / "run")
