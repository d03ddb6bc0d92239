"""Runs in subprocesses: killed, told to stop, and several together."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from wn21k_zoo.training.folder import open_folder
from wn21k_zoo.training.rescue import Rescue
from wn21k_zoo.training.signals import Signals
from wn21k_zoo.training.state import RunFolder, read_checkpoint
from wn21k_zoo.training.status import mark_preempted, read_status

from .checks import ALONE, FAST, assert_close_weights, assert_same_weights, final, lines, needs_compiler, run
from .runs import (
    BATCH,
    make_folder,
    measure_on_rank,
    run_alone_in_a_group,
    run_rank,
    run_rank_that_breaks,
    run_rank_that_fails_alone,
    run_rank_told_to_stop,
    run_that_is_stuck,
    run_until_killed,
    small_recipe,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Processes start with everything imported, including what torch imports for an optimizer (5 seconds in 2.12).
FORKS = multiprocessing.get_context("forkserver" if os.name != "nt" else "spawn")
if os.name != "nt":
    FORKS.set_forkserver_preload(["wn21k_zoo.training.engine", "tests.training.runs", "torch._dynamo"])
SPLIT = {"depth": 2, "embed_dim": 128}  # over 1 MiB of weights; DistributedDataParallel's first bucket takes that


@pytest.mark.slow
def test_20_kills_at_random_moments_leave_a_loadable_checkpoint(data, tmp_path):
    recipe = small_recipe(
        schedule={"epochs": 400}, run={"checkpoint_minutes": 1e-9, "log_every": 50, "evaluate_every": 9}
    )
    choose, reached = random.Random(1), 0  # noqa: S311
    for _ in range(20):
        process = FORKS.Process(target=run_until_killed, args=(recipe.to_json(), str(data), str(tmp_path / "run")))
        process.start()
        deadline = time.monotonic() + 60
        folder = RunFolder(tmp_path / "run")
        newer = f"step-{reached + 1:08d}.pt"
        while not any(path.name >= newer for path in folder.steps()) and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(choose.random() * 0.2)
        process.kill()
        process.join()
        steps = [read_checkpoint(path)["step"] for path in folder.steps()]  # every one of them is whole
        assert max(steps) > reached
        reached = max(steps)
        if folder.best.exists():
            read_checkpoint(folder.best)


def command(recipe, data, output, tmp_path, *, ranks=1, workers=0):
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    start = [sys.executable, "-m"]
    if ranks > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(ranks), "--rdzv-backend", "c10d"]
        start += ["--rdzv-endpoint", "localhost:0", "-m"]
    return [
        *start, "wn21k_zoo.training.train", "--recipe", str(tmp_path / "recipe.json"), "--data", str(data),
        "--output", str(output), "--workers", str(workers), "--device", "cpu",
    ]  # fmt: skip


# The same number of threads everywhere: it determines the order of additions.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def start():
    """Start processes, each in its own session, and leave none behind."""
    started = []

    def begin(arguments):
        options = {"stderr": subprocess.PIPE, "text": True, "env": ENVIRONMENT, "start_new_session": True}
        started.append(subprocess.Popen(arguments, **options))
        return started[-1]

    yield begin
    for process in started:
        if process.poll() is None:
            kill_all(process)


def kill_all(process):
    """Kill torchrun and its workers at once."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=30)
    process.communicate()


def run_on_ranks(count, recipe, data, output, device="cpu"):
    """A run on this many ranks without torchrun, whose processes would each import torch again."""
    store = output.with_name(f"{output.name}.store")
    processes = [
        FORKS.Process(target=run_rank, args=(str(store), rank, count, recipe.to_json(), str(data), str(output), device))
        for rank in range(count)
    ]
    with started(processes):
        assert joined(processes, 220) == [0] * count
    store.unlink(missing_ok=True)


@contextlib.contextmanager
def started(processes):
    """Run processes inside the context; none is left, or pytest would wait for it on exit."""
    try:
        for process in processes:
            process.start()
        yield
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def joined(processes, seconds):
    """Exit codes of processes, within this many seconds in all."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    return [process.exitcode for process in processes]


def wait_for_step(output, step, process):
    for _ in range(1200):
        if (output / "metrics.jsonl").exists() and len(lines(output)) >= step:
            return
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    raise AssertionError("no progress")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("images", "model"),
    [
        (BATCH, {}),
        (2, {}),
        # The smallest network of two buckets, at which the graph is split: compiling it takes a minute.
        pytest.param(
            2,
            {"compile": True, "architecture": "test_vit", "arguments": SPLIT},
            marks=[needs_compiler, pytest.mark.timeout(500)],
        ),
        (2, {"gradient_checkpointing": True}),
    ],
    ids=["whole", "accumulated", "compiled", "checkpointed"],
)
def test_two_ranks_equal_one_to_rounding(data, tmp_path, images, model):
    recipe = small_recipe(optimizer=FAST, model={**model, "compile": False, "gradient_checkpointing": False})
    run(recipe, data, tmp_path / "one")
    recipe = small_recipe(optimizer=FAST, model=model, data={"batch_per_device": images})
    run_on_ranks(2, recipe, data, tmp_path / "two")
    assert_close_weights(final(tmp_path / "one"), final(tmp_path / "two"), recipe=recipe)
    if recipe.model.compile:
        run_on_ranks(1, recipe, data, tmp_path / "compiled")
        assert_close_weights(final(tmp_path / "one"), final(tmp_path / "compiled"), recipe=recipe)
    evaluations = [lines(tmp_path / name, "evaluation") for name in ("one", "two")]
    assert [[line["images"] for line in each] for each in evaluations] == [[6, 6], [6, 6]]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("model", "lr"),
    # At a higher learning rate, batch normalisation over so few images amplifies rounding.
    [({}, 0.05), ({"architecture": "test_efficientnet", "sync_batchnorm": True}, 0.001)],
    ids=["plain", "sync_batchnorm"],
)
def test_two_gpus_equal_a_cpu_to_rounding(data, tmp_path, model, lr):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    sections = {"optimizer": {"name": "sgd", "lr": lr}, "schedule": {"epochs": 1}}
    recipe = small_recipe(**sections, model={**model, "sync_batchnorm": False})
    run(recipe, data, tmp_path / "one")
    for name in ("two", "again"):
        recipe = small_recipe(**sections, model=model, run={"deterministic": True})
        run_on_ranks(2, recipe, data, tmp_path / name, "cuda")
    assert_close_weights(final(tmp_path / "one"), final(tmp_path / "two"), 1e-3, recipe)
    assert_same_weights(final(tmp_path / "two"), final(tmp_path / "again"))


@pytest.mark.slow
def test_with_a_frozen_backbone_batch_normalisation_is_the_same_on_two_ranks(data, tmp_path):
    model = {"start": "random:test_efficientnet.r160_in1k", "freeze_backbone": True}
    recipe = small_recipe("test_efficientnet", model=model, optimizer=FAST)
    run(recipe, data, tmp_path / "one")
    run_on_ranks(2, recipe, data, tmp_path / "two")
    one, two = (final(tmp_path / name)["model"] for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=0, atol=2e-6 * name.startswith("classifier."), msg=name)
    assert float(one["classifier.bias"].abs().max()) > 1e-3  # it started at zero


@pytest.mark.slow
def test_without_a_compiler_torch_compile_says_so_in_one_line(data, tmp_path):
    recipe, output = small_recipe(model={"compile": True}), tmp_path / "run"
    without = {**ENVIRONMENT, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    arguments = command(recipe, data, output, tmp_path)
    done = subprocess.run(arguments, stderr=subprocess.PIPE, text=True, env=without, check=False)
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last.startswith("wn21k: torch.compile failed: "), done.stderr
    assert "no-such-compiler" in last
    assert "--set model.compile=false" in last
    assert "Traceback" not in done.stderr
    assert RunFolder(output).status()["state"] == "failed"
    recipe.model.compile = False  # the same run then resumes
    run(recipe, data, output)
    assert RunFolder(output).status()["state"] == "finished"


@pytest.mark.slow
def test_a_rank_without_an_image_changes_nothing(tmp_path):
    folder = make_folder(tmp_path / "images")
    (folder / open_folder(folder, "train").name(7)).write_bytes(b"nothing")
    # At a higher learning rate, the loss of so few images jumps and amplifies rounding.
    slow = {**FAST, "lr": 0.01}
    recipe = small_recipe(optimizer=slow, data={"batch_size": 2, "batch_per_device": 2}, schedule={"epochs": 1})
    run(recipe, folder, tmp_path / "one")
    recipe.data.batch_per_device = 1
    run_on_ranks(2, recipe, folder, tmp_path / "two")
    assert_close_weights(final(tmp_path / "one"), final(tmp_path / "two"), 1e-5)
    assert [lines(tmp_path / name)[-1]["bad_samples"] for name in ("one", "two")] == [1, 1]


def in_processes(target, tmp_path, count, *arguments):
    """What each of this many ranks puts into a queue."""
    results = FORKS.Queue()
    processes = [
        FORKS.Process(target=target, args=(str(tmp_path / f"store{count}"), rank, count, *arguments, results))
        for rank in range(count)
    ]
    with started(processes):
        found = [results.get(timeout=60) for _ in processes]
        assert joined(processes, 30) == [0] * count
    return found


@pytest.mark.slow
def test_figures_are_added_up_exactly_over_ranks(tmp_path):
    (alone,) = in_processes(measure_on_rank, tmp_path, 1)
    assert in_processes(measure_on_rank, tmp_path, 2) == [alone, alone]


@pytest.mark.slow
def test_one_rank_of_a_programs_group_may_run_alone(data, tmp_path):
    recipe = small_recipe(schedule={"epochs": 1}).to_json()
    found = in_processes(run_alone_in_a_group, tmp_path, 2, recipe, str(data), str(tmp_path / "run"))
    assert sorted(found) == [0, 6]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_ends_all_at_that_step(data, tmp_path):
    output = tmp_path / "run"
    found = in_processes(run_rank_that_breaks, tmp_path, 2, small_recipe().to_json(), str(data), str(output))
    assert sorted(rank for rank, _ in found) == [0, 1]
    assert all("The loss of step 9 is not finite" in message for _, message in found)
    assert RunFolder(output).status()["state"] == "failed"
    assert final(output)["step"] == 6


@pytest.mark.slow
def test_of_a_rank_that_fails_alone_the_reason_is_kept(data, tmp_path):
    output = tmp_path / "run"
    found = dict(in_processes(run_rank_that_fails_alone, tmp_path, 2, small_recipe().to_json(), str(data), str(output)))
    assert found[1] == "OSError: this rank alone"
    status = RunFolder(output).status()
    assert (status["state"], status["reason"]) == ("failed", "OSError: this rank alone")
    assert found[0] != found[1]  # it lost the connection


@pytest.mark.slow
@pytest.mark.parametrize("what", ["recipes", "data"])
def test_ranks_that_were_not_started_alike_do_not_begin(data, tmp_path, what):
    recipes, folders = [small_recipe().to_json()] * 2, [str(data)] * 2
    if what == "recipes":
        recipes[1] = small_recipe(optimizer={"lr": 0.5}).to_json()
    else:
        folders[1] = str(make_folder(tmp_path / "others", images=11))
    output = tmp_path / "run"
    results, store = FORKS.Queue(), tmp_path / "store"
    processes = [
        FORKS.Process(
            target=run_rank_that_fails_alone,
            args=(str(store), rank, 2, recipes[rank], folders[rank], str(output), results),
        )
        for rank in range(2)
    ]
    with started(processes):
        found = [results.get(timeout=60)[1] for _ in processes]
    assert found == [f"TrainingError: The processes of this run have different {what}; start all of them alike."] * 2
    assert not output.exists()


@pytest.mark.parametrize(("begun", "state"), [(True, "failed"), (False, "preempted")])
def test_a_run_that_failed_is_not_put_back_for_ever(tmp_path, begun, state):
    folder = RunFolder(tmp_path)
    folder.begin(small_recipe(), {})
    folder.set_status("failed", 3, reason="another rank")
    rescue = Rescue(folder, ALONE)
    rescue.begun = begun
    rescue(time.monotonic() + 1)
    assert folder.status()["state"] == state


@pytest.mark.slow
def test_one_rank_told_to_stop_while_all_evaluate_stops_all(data, tmp_path):
    recipe, output = small_recipe(data={"batch_per_device": 1}), tmp_path / "run"
    found = in_processes(run_rank_told_to_stop, tmp_path, 2, recipe.to_json(), str(data), str(output))
    assert found == [(143, 1)] * 2  # of three batches each
    assert RunFolder(output).status() | {"reason": ""} == {"state": "preempted", "step": 6, "total": 12, "reason": ""}
    assert final(output)["evaluated"] == 0
    run(recipe, data, output)
    assert [line["step"] for line in lines(output, "evaluation")] == [6, 12]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_and_resumed_is_bit_for_bit_the_same(data, tmp_path, start, ranks):
    recipe = small_recipe("test_efficientnet", schedule={"epochs": 15}, run={"checkpoint_minutes": 1e-9})
    recipe.run.log_every = 4  # so that it ends within a window
    recipe.model.arguments = {"drop_rate": 0.3}
    run_on_ranks(ranks, recipe, data, tmp_path / "whole")
    arguments = command(recipe, data, tmp_path / "parts", tmp_path, ranks=ranks)
    process = start(arguments)
    wait_for_step(tmp_path / "parts", 10, process)
    kill_all(process)
    killed = RunFolder(tmp_path / "parts")
    assert killed.status()["state"] == "running"
    assert killed.status()["step"] >= killed.newest_step() >= 8
    subprocess.run(arguments, check=True, env=ENVIRONMENT)
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path / "parts"))
    keys = ("step", "loss", "lr")
    assert [[line[key] for key in keys] for line in lines(tmp_path / "whole")] == [
        [line[key] for key in keys] for line in lines(tmp_path / "parts")
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "number", "code", "everybody"),
    [
        (1, "SIGTERM", 143, False),
        (1, "SIGTERM", 143, True),  # sent to all processes, as by Slurm and containers
        (1, "SIGINT", 130, True),
        (2, "SIGTERM", 1, False),
        (2, "SIGTERM", 1, True),
    ],
)
def test_told_to_stop_it_writes_a_checkpoint(data, tmp_path, start, ranks, number, code, everybody):
    recipe = small_recipe(schedule={"epochs": 500})
    process = start(command(recipe, data, tmp_path / "run", tmp_path, ranks=ranks, workers=int(everybody)))
    wait_for_step(tmp_path / "run", 10, process)
    begin = time.monotonic()
    family = psutil.Process(process.pid).children(recursive=True) if everybody else []
    for pid in (process.pid, *(member.pid for member in family)):
        os.kill(pid, getattr(signal, number))
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - begin < 30
    assert process.returncode == code, errors
    assert "stopped with a checkpoint; the same command resumes it" in errors
    status = RunFolder(tmp_path / "run").status()
    assert status["state"] == "preempted"
    assert final(tmp_path / "run")["step"] == status["step"]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_told_to_stop_inside_a_step_that_does_not_end_it_loses_that_step_alone(data, tmp_path, ranks):
    recipe = small_recipe("test_efficientnet", run={"ema_decay": 0.9})  # with batch statistics, which a step changes
    output, store = tmp_path / "parts", tmp_path / "store"
    arguments = recipe.to_json(), str(data), str(output)
    processes = [
        FORKS.Process(target=run_that_is_stuck, args=(str(store), rank, ranks, *arguments)) for rank in range(ranks)
    ]
    with started(processes):
        wait_for(lambda: all((tmp_path / f"store.stuck{rank}").exists() for rank in range(ranks)))
        for process in processes:
            os.kill(process.pid, signal.SIGTERM)
        assert joined(processes, 26) == [143] * ranks
    assert RunFolder(output).status() == {"state": "preempted", "step": 8, "total": 12}
    assert final(output)["step"] == 8
    for name in ("whole", "parts"):
        run_on_ranks(ranks, recipe, data, tmp_path / name)
    assert_same_weights(final(tmp_path / "whole"), final(output))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc says whether a process handles a signal")
def test_told_to_stop_before_it_begins_it_says_so(data, tmp_path, start):
    process = start(command(small_recipe(), data, tmp_path / "run", tmp_path))

    def handles():
        status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        caught = next(line for line in status if line.startswith("SigCgt"))
        return int(caught.split()[1], 16) & 1 << signal.SIGTERM - 1

    wait_for(handles)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert errors == "wn21k: told to stop before the run began; the same command starts it\n"
    assert RunFolder(tmp_path / "run").status() == {"state": "preempted", "step": 0}


def test_listening_ends_while_children_have_its_socket(monkeypatch):
    made, kept = socket.socketpair, []

    def pair():
        both = made()
        kept.extend(each.dup() for each in both)
        return both

    monkeypatch.setattr(socket, "socketpair", pair)
    thread = threading.active_count()
    with Signals().listening():
        assert threading.active_count() == thread + 1
    assert threading.active_count() == thread
    for each in kept:
        each.close()


@pytest.mark.parametrize(
    ("there", "state"),
    [
        ({}, "preempted"),
        ({"recipe.json": "{}"}, "preempted"),
        ({"status.json": '{"state": "running", "step": 7, "total": 9}'}, "preempted"),
        ({"status.json": '{"state": "finished", "step": 9, "total": 9}'}, "finished"),
        ({"photos.txt": "mine"}, None),
    ],
)
def test_the_mark_is_set_where_it_belongs(tmp_path, there, state):
    for name, text in there.items():
        (tmp_path / name).write_text(text)
    mark_preempted(tmp_path)
    status = read_status(tmp_path)
    assert status.get("state") == state
    if "status.json" in there:
        assert status | {"state": ""} == json.loads(there["status.json"]) | {"state": ""}


def test_a_file_is_no_folder_to_mark(tmp_path):
    (tmp_path / "file").write_text("mine")
    mark_preempted(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_mistakes_on_the_command_line_are_one_line(data, tmp_path):
    for changes, message in (
        (["--set", "optimizer.lrr=1"], "A recipe has no field optimizer.lrr. Did you mean lr?"),
        (["--data", str(tmp_path / "nowhere")], "nowhere"),
    ):
        arguments = [*command(small_recipe(), data, tmp_path / "run", tmp_path), *changes]
        done = subprocess.run(arguments, capture_output=True, text=True)
        assert done.returncode in (1, 2)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


@pytest.mark.slow
def test_the_benchmark_of_the_engine_runs():
    script = Path(__file__).parent.parent.parent / "benchmarks" / "engine.py"
    small = ["--size", "32", "--batch", "4", "--steps", "1", "--rounds", "2"]
    done = subprocess.run([sys.executable, str(script), *small], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "ratio" in done.stdout
