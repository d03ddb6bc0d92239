import errno
import functools
import multiprocessing
import signal
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch

from wn21k_zoo.errors import NonFiniteError, RunError
from wn21k_zoo.training import engine
from wn21k_zoo.training.engine import Preempted, train
from wn21k_zoo.training.export import export_run
from wn21k_zoo.training.learner import Learner
from wn21k_zoo.training.state import RunFolder, read_checkpoint

from .checks import ALONE, assert_same_weights, final, lines, run, run_told
from .runs import small_recipe

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe_of_everything():
    recipe = small_recipe("test_efficientnet")
    recipe.model.arguments = {"drop_rate": 0.3, "drop_path_rate": 0.2}
    recipe.run.ema_decay, recipe.optimizer.clip_norm, recipe.data.batch_per_device = 0.9, 1.0, 4
    recipe.data.augmentation, recipe.schedule.name, recipe.optimizer.name = "modern", "cosine", "adamw"
    recipe.data.mixup, recipe.data.cutmix = 0.2, 1.0
    recipe.run.evaluate_every = 2  # and no checkpoint after the first epoch
    recipe.run.log_every = 4  # lines that span the ends of epochs and of the first part
    return recipe


@pytest.fixture(scope="module", params=[small_recipe, recipe_of_everything], ids=["plain", "with everything"])
def in_one_go(request, one_thread, data, tmp_path_factory):
    """A recipe, and the folder of an uninterrupted run of it."""
    folder = tmp_path_factory.mktemp("whole")
    run(request.param(), data, folder)
    return request.param(), folder


@pytest.mark.parametrize("stop", [3, 6, pytest.param(7, marks=pytest.mark.slow), 12])
def test_stopped_and_resumed_is_bit_for_bit_the_same(data, in_one_go, tmp_path, stop_at, stop):
    recipe, whole_run = in_one_go
    stop_at(stop)
    with pytest.raises(Preempted) as end:
        run_told(recipe, data, tmp_path)
    assert end.value.code == 143
    status = RunFolder(tmp_path).status()
    assert (status["state"], status["step"]) == ("preempted", stop)
    stop_at(-1)
    run_told(recipe, data, tmp_path)
    assert_same_weights(final(whole_run), final(tmp_path))
    for kind in ("train", "evaluation"):
        whole, parts = lines(whole_run, kind), lines(tmp_path, kind)
        keys = ("step", "epoch", "loss", "lr", "semantic_top1", "top1")
        assert [[line.get(key) for key in keys] for line in whole] == [
            [line.get(key) for key in keys] for line in parts
        ]


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_resumed_with_a_teacher_in_half_precision_it_is_bit_for_bit_the_same(data, tmp_path, stop_at, precision):
    recipe = small_recipe(run={"precision": precision}, schedule={"epochs": 1})
    recipe.loss.teacher, recipe.loss.distillation_weight = "random:resnet10t", 1.0
    run(recipe, data, tmp_path / "whole")
    stop_at(4)
    with pytest.raises(Preempted):
        run_told(recipe, data, tmp_path / "parts")
    stop_at(-1)
    run_told(recipe, data, tmp_path / "parts")
    whole, parts = final(tmp_path / "whole"), final(tmp_path / "parts")
    assert_same_weights(whole, parts)
    assert whole["scaler"] == parts["scaler"]
    assert bool(whole["scaler"]) == (precision == "fp16")


def test_told_to_stop_before_its_first_step_it_stops(data, tmp_path, monkeypatch):
    build = Learner._build

    def told(self, *arguments):
        signal.raise_signal(signal.SIGTERM)
        build(self, *arguments)

    monkeypatch.setattr(Learner, "_build", told)
    with pytest.raises(Preempted):
        run_told(small_recipe(), data, tmp_path)
    assert RunFolder(tmp_path).status()["state"] == "preempted"
    assert not lines(tmp_path)
    monkeypatch.undo()
    run_told(small_recipe(), data, tmp_path)
    assert final(tmp_path)["step"] == 12


@pytest.mark.parametrize("damage", [None, pytest.param(b"", marks=pytest.mark.slow), b"x" * 1000])
def test_a_best_checkpoint_that_is_lost_or_damaged_is_replaced_by_the_next(
    data, tmp_path, stop_at, monkeypatch, caplog, damage
):
    scores = iter([90.0, 10.0])  # the second is not better
    monkeypatch.setattr(engine, "score", functools.lru_cache(lambda step: next(scores)))
    monkeypatch.setattr(engine, "score", lambda figures, score=engine.score: score(figures["images_per_second"]))
    stop_at(7)
    with pytest.raises(Preempted):
        run_told(small_recipe(), data, tmp_path)
    best = RunFolder(tmp_path).best
    assert read_checkpoint(best)["step"] == 6
    best.unlink()
    if damage is not None:
        best.write_bytes(damage)
    stop_at(-1)
    run_told(small_recipe(), data, tmp_path)
    assert read_checkpoint(best)["step"] == 12
    assert f"best.pt is {'gone' if damage is None else 'damaged'}; the next evaluation counts" in caplog.text
    assert best.with_suffix(".damaged").exists() == (damage is not None)


def test_a_best_checkpoint_that_cannot_be_read_now_is_not_called_damaged(data, tmp_path, stop_at, monkeypatch):
    stop_at(7)
    with pytest.raises(Preempted):
        run_told(small_recipe(), data, tmp_path)
    opened = zipfile.ZipFile

    def stale(path):
        if path.name == "best.pt":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return opened(path)

    monkeypatch.setattr(zipfile, "ZipFile", stale)
    stop_at(-1)
    with pytest.raises(RunError, match="Stale file handle"):
        run_told(small_recipe(), data, tmp_path)
    monkeypatch.undo()
    assert read_checkpoint(RunFolder(tmp_path).best)["step"] == 6


def test_a_finished_run_is_left_alone(data, tmp_path):
    figures = run(small_recipe(), data, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert run(small_recipe(), data, tmp_path) == figures
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_second_ctrl_c_ends_it_at_once_and_is_marked(data, tmp_path, at_loss):
    def interrupted(logits, number):
        if number == 9:  # of 12
            for _ in range(2):
                signal.raise_signal(signal.SIGINT)
                sum(range(1000))  # the handler runs between two steps of Python
        return logits

    at_loss(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_told(small_recipe(), data, tmp_path)
    assert RunFolder(tmp_path).status() == {"state": "preempted", "step": 6, "total": 12}
    assert final(tmp_path)["step"] == 6


@pytest.fixture
def ctrl_c():
    """Install Python's own handler, missing where a shell makes the tests ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_a_notebook_costs_no_step(data, tmp_path, at_loss, ctrl_c, capsys):
    def interrupted(logits, number):
        if number == 21:  # after the 12 of the whole run
            signal.raise_signal(signal.SIGINT)
        return logits

    at_loss(interrupted)
    run(small_recipe(), data, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(small_recipe(), data, tmp_path / "parts")
    assert "stopped with a checkpoint; start it again to resume" in capsys.readouterr().err
    assert RunFolder(tmp_path / "parts").status() == {"state": "preempted", "step": 9, "total": 12}
    run(small_recipe(), data, tmp_path / "parts")
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path / "parts"))


def test_a_run_that_ends_early_in_a_notebook_leaves_no_processes(data, tmp_path, at_loss, ctrl_c):
    before, during, held = set(multiprocessing.active_children()), [], []

    def interrupted(logits, number):
        during.append(len(set(multiprocessing.active_children()) - before))
        if number == 8:  # after an evaluation
            signal.raise_signal(signal.SIGINT)
        return logits * (float("nan") if number == 10 else 1)

    at_loss(interrupted)
    for error in (KeyboardInterrupt, NonFiniteError):
        with pytest.raises(error) as end:
            train(small_recipe(), data, tmp_path, ALONE, workers=1)
        held.append(end)  # as a notebook keeps the traceback
        assert set(multiprocessing.active_children()) == before
    assert max(during) == 2


def test_a_handler_of_the_programs_own_stays(data, tmp_path, at_loss, ctrl_c):
    heard = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    at_loss(lambda logits, number: signal.raise_signal(signal.SIGINT) or logits)
    run(small_recipe(schedule={"max_steps": 2}), data, tmp_path)
    assert heard == [signal.SIGINT] * 2
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_layout_is_told(data, tmp_path, stop_at, capsys):
    stop_at(3)
    with pytest.raises(Preempted):
        run_told(small_recipe(), data, tmp_path)
    stop_at(-1)
    run(small_recipe(data={"batch_per_device": 4}), data, tmp_path)
    assert "with 8 images at a time, and resumes in 1 with 4" in capsys.readouterr().err


def test_a_better_one_before_a_resume_stays_the_best(data, tmp_path, stop_at):
    stop_at(7)
    with pytest.raises(Preempted):
        run_told(small_recipe(), data, tmp_path)
    stop_at(-1)
    state = final(tmp_path)
    assert state["best"][1] == 6
    state["best"][0] = 200.0  # more than there can be
    torch.save(state, RunFolder(tmp_path).steps()[0])
    run(small_recipe(), data, tmp_path)
    assert read_checkpoint(RunFolder(tmp_path).best)["step"] == 6
    assert final(tmp_path)["best"] == [200.0, 6]


@pytest.mark.parametrize(
    ("minutes", "saved"),
    [(30.0, {6, 12}), (1.0, {2, 4, 6, 8, 10, 12}), pytest.param(0.1, {*range(1, 13)}, marks=pytest.mark.slow)],
)
def test_a_checkpoint_is_written_as_often_as_asked_for(data, tmp_path, monkeypatch, minutes, saved):
    seconds, steps = [0.0], set()
    begin, save = Learner.begin, engine.CheckpointWriter.save

    def later(self):
        seconds[0] += 40
        begin(self)

    def counted(self, state, **options):
        steps.add(state["step"])
        save(self, state, **options)

    monkeypatch.setattr(Learner, "begin", later)
    monkeypatch.setattr(engine.CheckpointWriter, "save", counted)
    monkeypatch.setattr(engine, "time", SimpleNamespace(monotonic=lambda: seconds[0], perf_counter=time.perf_counter))
    run(small_recipe(run={"checkpoint_minutes": minutes}), data, tmp_path)
    assert steps == saved


def test_the_best_on_fewer_images_is_not_the_best(data, tmp_path, stop_at):
    recipe = small_recipe(schedule={"epochs": 3}, run={"evaluate_batches": 1}, data={"batch_per_device": 4})
    stop_at(7)
    with pytest.raises(Preempted):
        run_told(recipe, data, tmp_path)
    stop_at(-1)
    assert final(tmp_path)["best"] == [lines(tmp_path, "evaluation")[0]["semantic_top1"], 4]
    assert lines(tmp_path, "evaluation")[0]["images"] == 4
    (best,) = [RunFolder(tmp_path).best]
    recipe.run.evaluate_batches = None
    state = final(tmp_path)
    state["best"][0] = 200.0  # more than there can be
    torch.save(state, RunFolder(tmp_path).steps()[0])
    run(recipe, data, tmp_path)
    assert read_checkpoint(best)["step"] > 6
    assert final(tmp_path)["best"] == [max(line["semantic_top1"] for line in lines(tmp_path, "evaluation")[1:]), 6]


def test_tensorboard_has_every_step_of_a_resumed_run(data, tmp_path, stop_at):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stop_at(6)
    with pytest.raises(Preempted):
        run_told(small_recipe(), data, tmp_path)
    stop_at(-1)
    run(small_recipe(), data, tmp_path)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [*range(1, 13)]
    assert [event.step for event in events.Scalars("evaluation/top1")] == [6, 12]
    assert [event.step for event in events.Scalars("evaluation/level_01")] == [6, 12]


def test_what_a_start_said_is_known_after_a_resume_by_the_runs_own_recipe(data, tmp_path, stop_at):
    schedule = {"epochs": 1}
    run(small_recipe("test_vit", model={"arguments": {"img_size": 32}}, schedule=schedule), data, tmp_path / "first")
    exported = export_run(tmp_path / "first", tmp_path / "exported")
    recipe = small_recipe("test_vit", model={"start": str(exported)}, schedule=schedule)
    for step, again in ((3, lambda: recipe), (4, RunFolder(tmp_path / "run").recipe)):
        stop_at(step)
        with pytest.raises(Preempted):
            run_told(again(), data, tmp_path / "run")
    stop_at(-1)
    exported.rename(tmp_path / "gone")
    run(recipe, data, tmp_path / "run")
