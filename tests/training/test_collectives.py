"""All collectives of ranks, on one device: gloo on the CPU and, where there is a GPU, NCCL.

NCCL does not allow two ranks on one GPU. So this is the first of two ranks, the second of which contributes nothing:
sums are those of the first, and nothing is waited for.
"""

import math
import os
import threading

import pytest
import torch
import torch.distributed as dist

from wn21k_zoo.errors import TrainingError
from wn21k_zoo.messages import say
from wn21k_zoo.training import distributed
from wn21k_zoo.training.checkpoint_writer import copied
from wn21k_zoo.training.data import Batch
from wn21k_zoo.training.distributed import World, join
from wn21k_zoo.training.engine import Preempted, train
from wn21k_zoo.training.learner import Learner
from wn21k_zoo.training.splits import open_splits
from wn21k_zoo.training.state import RunFolder
from wn21k_zoo.training.train import main

from .checks import assert_close_weights, assert_same_weights, final, lines, needs_compiler, run, run_told
from .runs import small_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture
def world(request, monkeypatch):
    # Port 0 means any free port.
    variables = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with join(request.param) as alone:
        assert dist.get_backend() == ("nccl" if request.param == "cuda" else "gloo")
        yield World(0, 2, alone.device)


def recipe_for_two(architecture="test_efficientnet", **model):
    recipe = small_recipe(architecture, model=model, run={"ema_decay": 0.9}, optimizer={"clip_norm": 1.0})
    recipe.data.batch_per_device = 2  # two micro-batches per step on this rank
    return recipe


def test_each_rank_has_the_gpu_of_its_number_and_touches_no_other(monkeypatch):
    touched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: touched.append(getattr(device, "index", device)))
    monkeypatch.setattr(distributed, "select_device", lambda device: touched.append("asked") or torch.device("cuda"))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with join() as world:
        assert world.device == torch.device("cuda", 2)
    assert touched == [2, "asked", 2]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(TrainingError, match="Local rank 4 has no GPU: there are 4"), join("cuda"):
        pass


@pytest.mark.parametrize("world", ["cpu"], indirect=True)
def test_a_process_group_that_is_there_is_taken_and_left(world):
    for _ in range(2):
        with join("cpu") as joined:
            assert (joined.rank, joined.size, joined.device) == (0, 1, world.device)
        assert dist.is_initialized()


def test_in_a_programs_own_process_group_its_gpu_is_taken(monkeypatch):
    group = {"is_initialized": True, "get_rank": 3, "get_world_size": 4, "get_backend_config": "cpu:gloo,cuda:nccl"}
    for name, value in group.items():
        monkeypatch.setattr(dist, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for asked, found in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu"), ("mps", "cpu")):
        monkeypatch.setattr(distributed, "select_device", torch.device)
        with join(asked) as world:
            assert (world.rank, world.size, str(world.device)) == (3, 4, found)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cuda:nccl")
    with join("cuda") as world:
        assert str(world.device) == "cuda:3"
    with pytest.raises(TrainingError, match=r"no backend for cpu \(it has cuda:nccl\)"), join("cpu"):
        pass


@pytest.mark.parametrize(("chosen", "found"), [(None, "^NVLS,NVLSTree"), ("Ring", "Ring")])
def test_sums_that_are_to_be_the_same_are_chosen_before_a_group_is_made(data, tmp_path, monkeypatch, chosen, found):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "NCCL_ALGO": chosen}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    seen = []

    def made(*_, **__):
        seen.append(os.environ.get("NCCL_ALGO"))
        raise RuntimeError("none here")

    monkeypatch.setattr(dist, "init_process_group", made)
    for deterministic in (False, True):
        with pytest.raises(TrainingError, match="cannot be reached"), join("cpu", deterministic):
            pass
    assert seen == [chosen, found]
    recipe = recipe_for_two()
    recipe.run.deterministic = True
    with pytest.raises(TrainingError, match="cannot be reached"):
        train(recipe, data, tmp_path / "run", device="cpu")
    (tmp_path / "recipe.json").write_text(recipe.to_json())
    arguments = ["--recipe", tmp_path / "recipe.json", "--data", data, "--output", tmp_path / "run", "--device", "cpu"]
    assert main([str(argument) for argument in arguments]) == 1
    assert seen[2:] == [found, found]
    assert os.environ.get("NCCL_ALGO") == chosen


@pytest.mark.parametrize("world", ["cpu", GPU], indirect=True)
def test_what_it_says_to_others_comes_back(world):
    assert (world.any(True), world.any(False)) == (True, False)
    assert world.mean(3.0, math.pi) == pytest.approx([1.5, math.pi / 2])  # over two ranks, one of which said nothing
    assert world.broadcast(2**40 + 1) == 2**40 + 1


@pytest.mark.parametrize("world", ["cpu"], indirect=True)
def test_ranks_do_not_send_each_other_batch_statistics_in_a_step(world, data):
    recipe = recipe_for_two()
    assert not Learner(recipe, open_splits(recipe, data), world, 10).network.will_sync_module_buffers()


@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=pytest.mark.slow), "fp16"])
@pytest.mark.parametrize("world", ["cpu", GPU], indirect=True)
def test_told_to_stop_it_goes_on_to_the_same_bits(world, data, tmp_path, stop_at, precision):
    recipe = recipe_for_two()
    recipe.run.precision, recipe.run.deterministic = precision, world.device.type == "cuda"
    figures = run(recipe, data, tmp_path / "whole", world)
    assert figures["images"] == 3  # of 6, the other rank having 3
    stop_at(7)
    with pytest.raises(Preempted):
        run_told(recipe, data, tmp_path / "parts", world)
    assert RunFolder(tmp_path / "parts").status()["state"] == "preempted"
    stop_at(-1)
    assert run(recipe, data, tmp_path / "parts", world) | {"images_per_second": 0} == figures | {"images_per_second": 0}
    assert_same_weights(final(tmp_path / "whole"), final(tmp_path / "parts"))
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "whole"))


@pytest.mark.parametrize(
    "model",
    [
        {"gradient_checkpointing": True},
        # On a CPU: test_processes.py. TF32 and batch statistics of two images would enlarge what a compiler rounds.
        pytest.param(
            {"compile": True, "architecture": "test_convnext"},
            marks=[
                needs_compiler,
                pytest.mark.gpu,
                pytest.mark.timeout(600),
                # Torch keeps it from being printed, but not from being made an error.
                pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
            ],
        ),
    ],
    ids=lambda model: next(iter(model)),
)
@pytest.mark.parametrize("world", ["cpu", GPU], indirect=True)
def test_what_a_network_may_do_in_a_step(world, data, tmp_path, model):
    if "compile" in model and world.device.type != "cuda":
        pytest.skip("test_processes.py compiles on a CPU")
    recipe = recipe_for_two(**model)
    run(recipe, data, tmp_path / "run", world)
    recipe.model.compile = recipe.model.gradient_checkpointing = False
    run(recipe, data, tmp_path / "plain", world)
    assert len(lines(tmp_path / "run")) == 12
    assert final(tmp_path / "run")["step"] == 12
    for line, plain in zip(lines(tmp_path / "run")[:2], lines(tmp_path / "plain")[:2], strict=True):
        assert line["loss"] == pytest.approx(plain["loss"], rel=1e-3)


@pytest.mark.gpu
def test_a_gpu_trains_as_a_cpu_does(data, tmp_path, monkeypatch):
    recipe = small_recipe(optimizer={"name": "sgd", "lr": 0.05}, run={"deterministic": True})
    run(recipe, data, tmp_path / "cpu")
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)
    run(recipe, data, tmp_path / "gpu", World(0, 1, torch.device("cuda", 0)))
    assert_close_weights(final(tmp_path / "cpu"), final(tmp_path / "gpu"), atol=1e-4)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda:0", marks=pytest.mark.gpu)])
def test_what_a_checkpoint_holds_can_be_read_beside_a_step(data, device):
    recipe = small_recipe("test_efficientnet", run={"ema_decay": 0.9})
    learner = Learner(recipe, open_splits(recipe, data), World(0, 1, torch.device(device)), 10)
    batch = Batch(torch.rand(4, 3, 32, 32, device=device), torch.arange(4, device=device), torch.arange(4))
    learner.begin()
    learner.backward(learner.loss(batch))  # loads the kernels, which may wait for the GPU
    learner.update()
    expected = copied(learner.state_dict())
    learner.begin()
    if device != "cpu":
        torch.cuda._sleep(10**10)  # cycles: some seconds, as if no other rank came
    learner.backward(learner.loss(batch))
    after = torch.cuda.current_stream().record_event() if device != "cpu" else None
    with learner.beside():
        state = copied(learner.state_dict())
    assert after is None or not after.query()  # it did not wait
    assert learner.is_finite(state)
    for part in ("model", "average"):
        for key, value in expected[part].items():
            assert torch.equal(value, state[part][key]), key
    assert any((learner.module.module.state_dict()[key].cpu() != value).any() for key, value in state["model"].items())


@pytest.mark.parametrize("text", ["", "two", "1.5"])
@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "RANK"])
def test_what_another_launcher_left_is_named(monkeypatch, name, text):
    monkeypatch.setenv(name, text)
    with pytest.raises(TrainingError, match=f"{name} is set to '{text}', which is not a number; unset it"), join("cpu"):
        pass


def test_of_what_says_that_there_is_none_this_process_is_alone(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "-1")
    with join("cpu") as world:
        assert (world.rank, world.size) == (0, 1)


def test_who_waits_for_others_says_so(monkeypatch, capfd):
    said = threading.Event()
    monkeypatch.setattr("wn21k_zoo.training.distributed._LONG", 0.01)
    monkeypatch.setattr("wn21k_zoo.training.distributed.say", lambda message: (say(message), said.set()))

    def waits(*_, **__):
        assert said.wait(30)
        raise RuntimeError("in vain")

    monkeypatch.setattr(dist, "init_process_group", waits)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "7"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(TrainingError, match="in vain"), join("cpu"):
        pass
    assert "waiting for all 2 processes at host:7" in capfd.readouterr().err
