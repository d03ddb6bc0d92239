import io
import math
import re
import signal
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from wn21k_zoo.errors import (
    BadImagesError,
    DataError,
    InvalidArgumentError,
    NonFiniteError,
    RecipeError,
    RunError,
    TrainingError,
)
from wn21k_zoo.training import engine
from wn21k_zoo.training.algorithms import is_deterministic
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.engine import Preempted
from wn21k_zoo.training.evaluate import evaluate
from wn21k_zoo.training.folder import open_folder
from wn21k_zoo.training.learner import Learner
from wn21k_zoo.training.network import Normalized, build_network
from wn21k_zoo.training.optimization import Criterion
from wn21k_zoo.training.state import RunFolder, read_checkpoint

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
    monkeypatch.setenv("COLUMNS", "160")
    run(small_recipe(schedule={"epochs": 1}), data, tmp_path)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "6/6" in shown
    assert re.search(r"loss \d.*images/s.*data .*left", shown)
    assert "wn21k: epoch 1  semantic_top1" in shown
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")  # the cursor is back


def test_it_learns(data, tmp_path):
    recipe = small_recipe(schedule={"epochs": 12}, optimizer={"lr": 3e-3}, data={"augmentation": "none"})
    figures = run(recipe, data, tmp_path)
    losses = [line["loss"] for line in lines(tmp_path)]
    assert sum(losses[-6:]) < 0.7 * sum(losses[:6])
    assert figures["semantic_top1"] == 100
    assert figures["levels"] == {0: 100, 1: 100}


@pytest.mark.parametrize("stop", [3, 6, 7, 12])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "with everything"])
def test_stopped_and_resumed_is_bit_for_bit_the_same(data, tmp_path, stop_at, stop, extras):
    recipe = small_recipe("test_efficientnet" if extras else "test_convnext")
    if extras:
        recipe.model.arguments = {"drop_rate": 0.3, "drop_path_rate": 0.2}
        recipe.run.ema_decay, recipe.optimizer.clip_norm, recipe.data.batch_per_device = 0.9, 1.0, 4
        recipe.data.augmentation, recipe.schedule.name, recipe.optimizer.name = "modern", "cosine", "adamw"
        recipe.data.mixup, recipe.data.cutmix = 0.2, 1.0
        recipe.run.log_every = 4  # lines over the ends of epochs and of the first part
    run(recipe, data, tmp_path / "whole")
    stop_at(stop)
    with pytest.raises(Preempted) as end:
        run_told(recipe, data, tmp_path / "parts")
    assert end.value.code == 143
    status = RunFolder(tmp_path / "parts").status()
    assert (status["state"], status["step"]) == ("preempted", stop)
    stop_at(-1)
    run_told(recipe, data, tmp_path / "parts")
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path / "parts"))
    for kind in ("train", "evaluation"):
        whole, parts = lines(tmp_path / "whole", kind), lines(tmp_path / "parts", kind)
        keys = ("step", "epoch", "loss", "lr", "semantic_top1", "top1")
        assert [[line.get(key) for key in keys] for line in whole] == [
            [line.get(key) for key in keys] for line in parts
        ]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_resumed_with_a_teacher_in_half_precision_it_is_bit_for_bit_the_same(data, tmp_path, stop_at, precision):
    recipe = small_recipe(run={"precision": precision})
    recipe.loss.teacher, recipe.loss.distillation_weight = "random:resnet10t", 1.0
    run(recipe, data, tmp_path / "whole")
    stop_at(7)
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


def test_accumulation_equals_one_large_batch_to_rounding(data, tmp_path):
    for size in (BATCH, 2):
        run(small_recipe(data={"batch_per_device": size}, optimizer=FAST), data, tmp_path / str(size))
    assert_close_weights(final(tmp_path / str(BATCH)), final(tmp_path / "2"))


def test_a_finished_run_is_left_alone(data, tmp_path, capsys):
    figures = run(small_recipe(), data, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    assert run(small_recipe(), data, tmp_path) == figures
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_a_loss_that_is_not_finite_ends_the_run_and_leaves_the_last_checkpoint(
    data, tmp_path, monkeypatch, at_loss, bad, device
):
    world = World(0, 1, torch.device(device))
    at_loss(lambda logits, number: logits * bad if number == 9 else logits)
    with pytest.raises(NonFiniteError, match="The loss of step 9 is not finite"):
        run(small_recipe(), data, tmp_path, world)
    assert RunFolder(tmp_path).status()["state"] == "failed"
    assert final(tmp_path)["step"] == 6
    monkeypatch.undo()
    run(small_recipe(), data, tmp_path, world)
    assert final(tmp_path)["step"] == 12


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"batch_size": 64}}, "fewer than data.batch_size 64"),
        ({"data": {"label_space": "imagenet1k"}}, r"by a class of imagenet1k\. .* set data\.label_space to null"),
        ({"loss": {"teacher": "resnet50.miil_in21k"}}, "distillation_weight is 0"),
        ({"model": {"arguments": {"no_such": 1}}}, "test_convnext cannot be built: .*no_such"),
        (
            {"model": {"architecture": "resnet18", "arguments": {"output_stride": 7}}},
            "resnet18 cannot be built: Assert",
        ),
        ({"model": {"start": "resnet50.a1_in1kk"}}, "Did you mean"),
        (
            {"model": {"architecture": "test_convnxt"}},
            "no architecture 'test_convnxt'. Did you mean test_conv",
        ),
        ({"data": {"label_space": "fall12"}}, "Did you mean fall11"),
        ({"model": {"architecture": "vit_tiny_patch16_224"}}, "The network does not take images of 32 pixels"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is_written(data, tmp_path, sections, message):
    with pytest.raises(Exception, match=message) as error:
        run(small_recipe(**sections), data, tmp_path / "run")
    assert type(error.value).__module__ == "wn21k_zoo.errors"
    assert not (tmp_path / "run" / "recipe.json").exists()
    run(small_recipe(schedule={"max_steps": 1}), data, tmp_path / "run")  # nothing is in the way of a right one


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
    """Python's own handler, which is not there where a shell has the tests ignore the signal."""
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
    assert "stopped with a checkpoint; begun again it goes on" in capsys.readouterr().err
    assert RunFolder(tmp_path / "parts").status() == {"state": "preempted", "step": 9, "total": 12}
    run(small_recipe(), data, tmp_path / "parts")
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path / "parts"))


def test_a_handler_of_the_programs_own_stays(data, tmp_path, at_loss, ctrl_c):
    heard = []
    signal.signal(signal.SIGINT, lambda number, frame: heard.append(number))
    at_loss(lambda logits, number: signal.raise_signal(signal.SIGINT) or logits)
    run(small_recipe(schedule={"max_steps": 2}), data, tmp_path)
    assert heard == [signal.SIGINT] * 2
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
def test_what_is_torchs_is_afterwards_as_it_was(data, tmp_path, deterministic, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    torch.use_deterministic_algorithms(deterministic)
    try:
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        run(small_recipe(run={"deterministic": not deterministic}, schedule={"max_steps": 1}), data, tmp_path)
        assert torch.equal(torch.rand(4), expected)
        assert torch.are_deterministic_algorithms_enabled() == deterministic
        assert torch.backends.cudnn.benchmark == deterministic
    finally:
        torch.use_deterministic_algorithms(False)


def test_what_is_no_recipe_or_device_is_said(data, tmp_path):
    with pytest.raises(RecipeError, match="take one of wn21k_zoo"):
        engine.train("finetune", data, tmp_path)
    with pytest.raises(InvalidArgumentError, match="use auto, cpu, cuda"):
        engine.train(small_recipe(), data, tmp_path, device="gpu")
    with pytest.raises(InvalidArgumentError, match="The world says"):
        run(small_recipe(), data, tmp_path, device="cpu")
    engine.train(small_recipe(schedule={"max_steps": 1}), data, tmp_path, device="cpu", workers=0)
    assert final(tmp_path)["step"] == 1


def test_an_operation_that_is_not_deterministic_is_one_line(data, tmp_path, at_loss):
    def putting(logits, _):
        torch.zeros(1).put_(torch.zeros(1, dtype=torch.int64), torch.ones(1))
        return logits

    at_loss(putting)
    with pytest.raises(RecipeError, match=r"put_.* has no deterministic .*; set run.deterministic to false"):
        run(small_recipe(run={"deterministic": True}), data, tmp_path)
    assert RunFolder(tmp_path).status()["state"] == "failed"
    assert not torch.are_deterministic_algorithms_enabled()


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


def test_an_evaluation_that_fails_costs_no_training(data, tmp_path, monkeypatch):
    def damaged(self):
        raise BadImagesError("All of them.")

    monkeypatch.setattr(engine._Run, "_evaluate", damaged)
    with pytest.raises(BadImagesError):
        run(small_recipe(), data, tmp_path)
    assert (final(tmp_path)["step"], final(tmp_path)["evaluated"]) == (6, 0)
    monkeypatch.undo()
    run(small_recipe(), data, tmp_path)
    assert [line["step"] for line in lines(tmp_path, "evaluation")] == [6, 12]
    run(small_recipe(), data, tmp_path / "whole")
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path))


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


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(DataError):
        run(small_recipe(), tmp_path / "nowhere", tmp_path / "run")


FULL = [
    torch.OutOfMemoryError("CUDA out of memory."),
    RuntimeError("MPS backend out of memory (MPS allocated: 17 GB)."),
]


@pytest.mark.parametrize("error", FULL, ids=["cuda", "mps"])
def test_too_little_memory_is_one_line_that_says_what_to_change(data, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(Criterion, "forward", full)
    with pytest.raises(RunError, match=r"not enough for 8 images at a time: set data\.batch_per_device below 8"):
        run(small_recipe(), data, tmp_path)
    assert "not enough" in RunFolder(tmp_path).status()["reason"]


def test_gradients_that_overflow_at_every_step_end_a_run_in_fp16(data, tmp_path, monkeypatch):
    backward = Learner.backward
    monkeypatch.setattr(Learner, "backward", lambda self, loss: backward(self, loss * 1e30))
    recipe = small_recipe(run={"precision": "fp16"}, schedule={"epochs": 7})
    with pytest.raises(NonFiniteError, match=r"not finite in fp16.*; set run\.precision to bf16 or fp32"):
        run(recipe, data, tmp_path)


@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
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


@pytest.mark.parametrize("error", FULL, ids=["cuda", "mps"])
def test_too_little_memory_for_the_network_itself(data, tmp_path, monkeypatch, error):
    def full(*_, **__):
        raise error

    monkeypatch.setattr(Normalized, "forward", full)
    with pytest.raises(RunError, match="memory of cpu is not enough for the network itself"):
        run(small_recipe(), data, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_weights_that_are_not_finite_are_not_saved(data, tmp_path, monkeypatch):
    step = torch.optim.Adam.step
    calls = []

    def breaking(self, *arguments, **options):
        step(self, *arguments, **options)
        calls.append(1)
        if len(calls) == 12:
            self.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(torch.optim.Adam, "step", breaking)
    with pytest.raises(NonFiniteError, match="The weights after step 12 are not finite, although its loss was"):
        run(small_recipe(), data, tmp_path)
    assert final(tmp_path)["step"] == 6


def test_another_layout_is_told(data, tmp_path, stop_at, capsys):
    stop_at(3)
    with pytest.raises(Preempted):
        run_told(small_recipe(), data, tmp_path)
    stop_at(-1)
    run(small_recipe(data={"batch_per_device": 4}), data, tmp_path)
    assert "with 8 images at a time, and goes on in 1 with 4" in capsys.readouterr().err


def test_a_process_that_loads_images_and_is_gone_is_one_line(data, tmp_path, monkeypatch):
    def gone(*_, **__):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \n more")

    monkeypatch.setattr(Criterion, "forward", gone)
    with pytest.raises(DataError, match=r"A process that loads images is gone: .*take fewer workers"):
        run(small_recipe(), data, tmp_path)


@pytest.mark.parametrize(
    "problem",
    [RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), OSError("loading"), ValueError()],
)
def test_what_was_run_before_something_failed_is_kept(data, tmp_path, monkeypatch, problem):
    recipe = small_recipe(run={"ema_decay": 0.9})
    run(recipe, data, tmp_path / "whole")
    with monkeypatch.context() as patched:
        forward, steps = Criterion.forward, []

        def failing(*arguments):
            steps.append(1)
            if len(steps) == 5:
                raise problem
            return forward(*arguments)

        patched.setattr(Criterion, "forward", failing)
        with pytest.raises(DataError if isinstance(problem, RuntimeError) else type(problem)):
            run(recipe, data, tmp_path / "parts")
    folder = RunFolder(tmp_path / "parts")
    assert folder.newest_step() == 4
    assert (folder.status()["state"], folder.status()["step"]) == ("failed", 4)
    run(recipe, data, tmp_path / "parts")
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path / "parts"))


def test_what_torch_says_amid_the_end_does_not_hide_the_reason(data, tmp_path, monkeypatch):
    said, set_status = [], RunFolder.set_status

    def interrupted(self, state, step, **more):  # by the handler of SIGCHLD
        if state == "failed" and not said:
            said.append(1)
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
        set_status(self, state, step, **more)

    def gone(*_):
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(RunFolder, "set_status", interrupted)
    monkeypatch.setattr("torch.utils.data.dataloader._SingleProcessDataLoaderIter._next_data", gone)
    with pytest.raises(DataError, match="A process that loads images is gone"):
        run(small_recipe(), data, tmp_path)
    assert "A process that loads images is gone" in RunFolder(tmp_path).status()["reason"]
    assert not RunFolder(tmp_path).steps()  # nothing was run


def test_others_that_are_gone_are_said_in_one_line(data, tmp_path, monkeypatch):
    def gone(*_):
        raise RuntimeError("[/x/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:1: Connection reset by peer")

    monkeypatch.setattr(Criterion, "forward", gone)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "broadcast", lambda *_, **__: None)
    monkeypatch.setattr("wn21k_zoo.training.learner.DistributedDataParallel", lambda module, **_: module)
    with pytest.raises(
        TrainingError, match=r"The connection to the other processes failed: .*reset by peer\. If one of them is gone"
    ):
        run(small_recipe(), data, tmp_path, World(0, 2, torch.device("cpu")))


def test_a_folder_that_is_called_like_a_library_is_not_its_error(data, tmp_path, monkeypatch):
    def damaged(*_):
        raise BadImagesError("12 images are damaged, out of memory/gloo/a.jpg and igloo/gloo/b.jpg, say")

    monkeypatch.setattr(Criterion, "forward", damaged)
    with pytest.raises(BadImagesError, match="igloo"):
        run(small_recipe(), data, tmp_path)


def test_a_full_disk_behind_a_failure_does_not_hide_it(data, tmp_path, at_loss, monkeypatch, capsys):
    def failing(logits, number):
        if number == 5:
            monkeypatch.setattr("wn21k_zoo.training.checkpoint_writer.CheckpointWriter._write", full)
            raise ValueError("the reason")
        return logits

    def full(*_, **__):
        raise RunError("The checkpoint cannot be written: no space")

    at_loss(failing)
    with pytest.raises(ValueError, match="the reason"):
        run(small_recipe(), data, tmp_path)
    assert "no space" in capsys.readouterr().err


def test_a_step_that_is_not_wholly_counted_is_not_kept(data, tmp_path, monkeypatch):
    update, steps = Learner.update, []

    def interrupted(self):
        update(self)
        steps.append(1)
        if len(steps) == 4:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(Learner, "update", interrupted)
    with pytest.raises(DataError):
        run(small_recipe(), data, tmp_path)
    assert not RunFolder(tmp_path).steps()


def test_classes_above_each_other_are_for_one_softmax(tmp_path):
    data = make_folder(tmp_path / "images", names=("n02121808", "n02123045"), images=12)
    with pytest.raises(RecipeError, match=r"set loss\.kind to single_label"):
        run(small_recipe(), data, tmp_path / "run")
    figures = run(small_recipe(loss={"kind": "single_label"}), data, tmp_path / "run")
    assert 0 <= figures["top1"] <= 100


@pytest.mark.parametrize("loader", ["evaluation", "run"])
def test_a_last_batch_without_an_image_that_can_be_read(tmp_path, loader):
    data = make_folder(tmp_path / "images", images=20)  # two of each class for validation
    validation = open_folder(data, "validation")
    (data / validation.name(len(validation) - 1)).write_bytes(b"nothing")
    recipe = small_recipe(data={"batch_size": 11, "batch_per_device": 11}, schedule={"max_steps": 1})
    figures = run(recipe, data, tmp_path / "run")
    if loader == "evaluation":
        figures = evaluate(tmp_path / "run", data, workers=0, batch_size=11)
    assert figures["images"] == 11


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ["test_efficientnet", "test_vit"])
def test_a_batch_without_an_image(tmp_path, architecture, checkpointing):
    data = make_folder(tmp_path / "images")
    (data / open_folder(data, "train").name(7)).write_bytes(b"nothing")
    recipe = small_recipe(architecture, data={"batch_per_device": 1, "batch_size": 4, "size": 64})
    recipe.model.gradient_checkpointing = checkpointing
    recipe.model.arguments = {"drop_path_rate": 0.1, **({"img_size": 64} if architecture == "test_vit" else {})}
    recipe.schedule.epochs = 1
    run(recipe, data, tmp_path / "run")
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "run"))
    assert lines(tmp_path / "run")[-1]["bad_samples"] == 1


@pytest.mark.parametrize("images", [1, 2])
def test_a_damaged_image_counts_the_same_however_a_step_is_divided(tmp_path, images):
    data = make_folder(tmp_path / "images")
    (data / open_folder(data, "train").name(7)).write_bytes(b"nothing")
    for micro in (BATCH, images):
        recipe = small_recipe(optimizer=FAST, data={"batch_per_device": micro, "batch_size": BATCH})
        run(recipe, data, tmp_path / str(micro))
    assert_close_weights(final(tmp_path / str(BATCH)), final(tmp_path / str(images)))
    assert lines(tmp_path / str(images))[-1]["bad_samples"] == 2  # once in each epoch


def test_a_damaged_image_ends_no_run_with_two_images_at_a_time(tmp_path):
    data = make_folder(tmp_path / "images", images=4)
    (data / open_folder(data, "train").name(7)).write_bytes(b"nothing")
    run(small_recipe("test_efficientnet", data={"batch_size": 2}, schedule={"epochs": 1}), data, tmp_path / "run")
    assert lines(tmp_path / "run")[-1]["bad_samples"] == 1


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


@pytest.mark.parametrize(("minutes", "saved"), [(30.0, {6, 12}), (1.0, {2, 4, 6, 8, 10, 12}), (0.1, {*range(1, 13)})])
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_evaluations_compute_in_the_precision_of_the_recipe(data, tmp_path, monkeypatch, precision):
    kinds, update = set(), engine.Evaluation.update

    def watched(self, logits, targets):
        kinds.add(logits.dtype)
        update(self, logits, targets)

    monkeypatch.setattr(engine.Evaluation, "update", watched)
    run(small_recipe(run={"precision": precision}, schedule={"max_steps": 1}), data, tmp_path)
    assert kinds == {torch.bfloat16 if precision == "bf16" else torch.float32}


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


def test_a_tensorboard_that_does_not_work_ends_no_run(data, tmp_path, monkeypatch, caplog):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise TypeError("Descriptors cannot be created directly")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Broken("torch.utils.tensorboard"))
    run(small_recipe(schedule={"epochs": 1}), data, tmp_path)
    assert "TensorBoard does not work here" in caplog.text
    assert len(lines(tmp_path)) == 6


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"features_only": True}, "model.arguments cannot have 'features_only'"),
        ({"pretrained": True}, "model.arguments cannot have 'pretrained'"),
        ({"global_pool": ""}, r"The network gives \[1, 6, 1, 1\] for an image, not \[1, 6\]"),
    ],
)
def test_a_network_that_gives_no_logits(data, tmp_path, arguments, message):
    with pytest.raises(RecipeError, match=message):
        run(small_recipe(model={"arguments": arguments}), data, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_class_folders_named_by_wnids_take_the_classes_of_a_label_space(tmp_path, capsys):
    data = make_folder(tmp_path / "images", names=("n01443537", "n02123045", "n02099601"), images=12)
    recipe = small_recipe(data={"label_space": "imagenet1k"}, loss={"kind": "single_label"})
    figures = run(recipe, data, tmp_path / "run")
    assert figures["classes_with_images"] == 3
    assert "1,000 classes (997 without images for validation)" in capsys.readouterr().err
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
