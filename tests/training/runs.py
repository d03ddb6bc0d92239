"""Small runs for the tests of the engine: six synsets on two levels, networks of a few thousand parameters."""

import io
import math
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from wn21k_zoo.errors import NonFiniteError, first_line
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.engine import Preempted, train
from wn21k_zoo.training.evaluation import Evaluation
from wn21k_zoo.training.optimization import Criterion
from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.training.signals import Signals
from wn21k_zoo.tree import SemanticTree

# feline, canine, plant; cat below the first, wolf and fox below the second
WNIDS = ("n02120997", "n02083346", "n00017222", "n02121620", "n02114100", "n02118333")
COLOURS = ((200, 80, 80), (80, 80, 200), (80, 200, 80), (220, 40, 140), (40, 140, 220), (140, 40, 220))
BATCH = 8


def make_folder(folder, images=10, names=WNIDS):
    """A folder of class folders; each class has its own colour, so there is something to learn."""
    generator = np.random.default_rng(0)
    for number, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index in range(images):
            noise = generator.integers(-40, 41, (36, 40, 3))
            pixels = np.clip(np.array(COLOURS[number]) + noise, 0, 255).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "JPEG")
            (folder / name / f"{index}.jpg").write_bytes(file.getvalue())
    return folder


def small_recipe(architecture="test_convnext", **sections):
    """Batches of 8 out of 54 images, so 6 steps per epoch."""
    recipe = Recipe(name="small", model={"architecture": architecture})
    recipe.data.label_space, recipe.data.size, recipe.data.window = None, 32, 1
    recipe.data.batch_size = recipe.data.batch_per_device = BATCH
    recipe.schedule.epochs = 2
    recipe.run.precision, recipe.run.log_every = "fp32", 1
    for name, fields in sections.items():
        for field, value in fields.items():
            setattr(getattr(recipe, name), field, value)
    return recipe


def run_until_killed(recipe_json, data, output):
    """A run in its own process, on one thread, for a test to kill."""
    os.environ["TERM"] = "dumb"
    torch.set_num_threads(1)
    train(Recipe.from_json(recipe_json), data, Path(output), World(0, 1, torch.device("cpu")), workers=0)


def joined(store, rank, world_size, device="cpu"):
    """Join the process group, on one thread; on ``cuda`` each rank has a GPU, which computes like a CPU."""
    torch.set_num_threads(1)
    if device == "cuda":
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
        there = torch.device("cuda", rank)
        torch.cuda.set_device(there)
        method = f"file://{store}"
        dist.init_process_group("nccl", init_method=method, rank=rank, world_size=world_size, device_id=there)
        return World(rank, world_size, there)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    return World(rank, world_size, torch.device("cpu"))


def run_rank(store, rank, world_size, recipe_json, data, output, device="cpu"):
    """A rank of a run."""
    train(Recipe.from_json(recipe_json), data, Path(output), joined(store, rank, world_size, device), workers=0)
    if dist.is_initialized():
        dist.destroy_process_group()


def in_ninth_step(action):
    """Pass the logits of the ninth step through ``action`` first."""
    forward, calls = Criterion.forward, []

    def changed(self, logits, *others):
        calls.append(1)
        return forward(self, action(logits) if len(calls) == 9 else logits, *others)

    Criterion.forward = changed


class Measured(nn.Module):
    """A network that feeds its outputs to an evaluation."""

    def __init__(self, evaluation):
        super().__init__()
        self.evaluation, self.scale = evaluation, nn.Parameter(torch.ones(()))

    def forward(self, logits, targets):
        self.evaluation.update(logits * self.scale, targets)
        return logits * self.scale


def measure_on_rank(store, rank, world_size, results):
    """Evaluate every world_size-th row of two batches in a DDP network; puts the figures of all ranks together."""
    joined(store, rank, world_size)
    tree = SemanticTree.from_wnids(WNIDS)
    generator = torch.Generator().manual_seed(3)
    logits, targets = torch.randn(101, 6, generator=generator), torch.randint(0, 6, (101,), generator=generator)
    evaluation = Evaluation(tree, "semantic_softmax", range(6))
    measured = Measured(evaluation)
    network = DistributedDataParallel(measured) if world_size > 1 else measured
    for batch in (slice(0, 50), slice(50, None)):
        network(logits[batch][rank::world_size], targets[batch][rank::world_size])
    evaluation.compute()  # the second call must give the same: each rank keeps its own counts
    results.put(evaluation.compute())
    if world_size > 1:
        dist.destroy_process_group()


def run_rank_that_breaks(store, rank, world_size, recipe_json, data, output, results):
    """A rank of a run in which the loss of the last rank is NaN at its ninth step."""
    world = joined(store, rank, world_size)
    if rank == world_size - 1:
        in_ninth_step(lambda logits: logits * math.nan)
    try:
        train(Recipe.from_json(recipe_json), data, Path(output), world, workers=0)
    except NonFiniteError as error:
        results.put((rank, str(error)))
    dist.destroy_process_group()


def run_alone_in_a_group(store, rank, world_size, recipe_json, data, output, results):
    """A run of the first rank alone, in a program's process group; puts the number of images of its evaluation."""
    joined(store, rank, world_size)
    alone = World(0, 1, torch.device("cpu"))
    results.put(train(Recipe.from_json(recipe_json), data, Path(output), alone, workers=0)["images"] if not rank else 0)
    dist.destroy_process_group()


def run_rank_that_fails_alone(store, rank, world_size, recipe_json, data, output, results):
    """A rank of a run whose last rank fails in its ninth step, while the others wait for it."""

    def failing(logits):
        raise OSError("this rank alone")

    world = joined(store, rank, world_size)
    if rank == world_size - 1:
        in_ninth_step(failing)
    try:
        train(Recipe.from_json(recipe_json), data, Path(output), world, workers=0)
    except Exception as error:
        results.put((rank, first_line(error)))
    results.close()
    results.join_thread()
    os._exit(0)


def run_rank_told_to_stop(store, rank, world_size, recipe_json, data, output, results):
    """A rank of a run in which the last rank alone gets SIGTERM in the first evaluation.

    Puts the exit code and the number of batches evaluated.
    """
    world = joined(store, rank, world_size)
    update, calls = Evaluation.update, []

    def stopping(self, logits, targets):
        calls.append(1)
        if len(calls) == 1 and rank == world_size - 1:
            signal.raise_signal(signal.SIGTERM)
        return update(self, logits, targets)

    Evaluation.update = stopping
    signals = Signals()
    try:
        with signals.listening():
            train(Recipe.from_json(recipe_json), data, Path(output), world, workers=0, signals=signals)
    except Preempted as end:
        results.put((end.code, len(calls)))
    dist.destroy_process_group()


def run_that_is_stuck(store, rank, world_size, recipe_json, data, output):
    """A rank of a run whose ninth step hangs inside one C++ call, where no signal handler runs."""

    def stuck(logits):
        Path(f"{store}.stuck{rank}").touch()
        torch.linalg.svd(torch.rand(9000, 9000))
        return logits

    world = joined(store, rank, world_size)
    in_ninth_step(stuck)
    signals = Signals(patience=1)
    with signals.listening():
        try:
            train(Recipe.from_json(recipe_json), data, Path(output), world, workers=0, signals=signals)
        except Preempted as end:
            sys.exit(end.code)
