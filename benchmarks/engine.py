"""Images per second of the engine's step compared with a bare training step, on the same synthetic images.

    python benchmarks/engine.py --architecture resnet50 --size 224 --batch 64 --device cuda

Both run forward, loss, backward, clipping and the optimizer with the same network, precision and memory format; the
engine adds what a run needs: agreement on stops and on losses that are not finite, seeds, metrics, progress. No images
are read: the loader has its own benchmark.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grad_norm_

from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training import engine
from wn21k_zoo.training.algorithms import torch_as_it_was
from wn21k_zoo.training.data import Batch
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.progress import Reporter
from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.training.rescue import Rescue
from wn21k_zoo.training.signals import Signals
from wn21k_zoo.training.splits import Splits
from wn21k_zoo.training.state import RunFolder
from wn21k_zoo.tree import SemanticTree


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="regnetx_002")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=10, help="steps of each per round")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--threads", type=int)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    recipe = Recipe(name="benchmark", model={"architecture": arguments.architecture})
    recipe.data.size, recipe.data.batch_size, recipe.data.batch_per_device = (
        arguments.size,
        arguments.batch,
        arguments.batch,
    )
    recipe.run.precision, recipe.optimizer.clip_norm = arguments.precision, 1.0
    space = LabelSpace.load("fall11")
    images = range(arguments.batch * 100_000)
    splits = Splits(_Synthetic(space, images), _Synthetic(space, images), space, SemanticTree.load("fall11"))
    device = torch.device(arguments.device)
    batch = Batch(
        torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=device).to(
            memory_format=torch.channels_last
        ),
        torch.randint(0, len(space), (arguments.batch,), device=device),
        torch.arange(arguments.batch),
    )
    with tempfile.TemporaryDirectory() as folder, torch_as_it_was(device):
        ours, bare = (
            _engine(recipe, splits, Path(folder) / "ours", device),
            _engine(recipe, splits, Path(folder) / "bare", device),
        )
        ratios, speeds = [], {"engine": [], "bare": []}
        for number in range(arguments.rounds):
            pair = {}
            order = ("engine", "bare") if number % 2 else ("bare", "engine")  # the second one finds a warm machine
            for name in order:
                _wait(device)
                begin = time.perf_counter()
                if name == "engine":
                    ours._steps(iter([batch] * arguments.steps), arguments.steps)
                else:
                    _bare_steps(bare, batch, arguments.steps)
                _wait(device)
                pair[name] = arguments.batch * arguments.steps / (time.perf_counter() - begin)
            if number:
                ratios.append(pair["engine"] / pair["bare"])
                for name, speed in pair.items():
                    speeds[name].append(speed)
        ours.reporter.close()
    print(f"{arguments.architecture}, {arguments.size} px, batch {arguments.batch}, {arguments.precision}, {device}")
    for name, values in speeds.items():
        print(f"{name:8} {statistics.median(values):10.1f} images/s")
    print(
        f"ratio    {statistics.median(ratios):10.3f} (median of {len(ratios)}, {min(ratios):.3f} to {max(ratios):.3f})"
    )


class _Synthetic:
    """A data set as large as a run's might be; its images are never read."""

    def __init__(self, space, images) -> None:
        self.label_space, self.class_names, self._images = space, space.wnids, images
        self.digest = ""
        self.lengths = (len(images),)

    def __len__(self) -> int:
        return len(self._images)

    def index(self, shard):
        return {"target": np.arange(len(self._images)) % len(self.label_space)}

    def shard_name(self, shard) -> str:
        return "synthetic"


def _engine(recipe, splits, folder, device):
    world = World(0, 1, device)
    folder = RunFolder(folder)
    run = engine._Run(recipe, splits, folder, world, Signals(), Rescue(folder, world), 0)
    folder.begin(recipe, splits.describe())
    run.reporter, run.writer, run._saved_at = Reporter(run.folder, run.total, 0), None, time.monotonic()
    return run


def _bare_steps(run, batch, steps) -> None:
    """Run a training loop with nothing else in it."""
    learner = run.learner
    learner.network.train()
    for _ in range(steps):
        with learner.autocast():
            logits = learner.module.module(batch.images)
        loss = learner.criterion.loss(logits, batch.targets)
        learner.scaler.scale(loss).backward()
        learner.scaler.unscale_(learner.optimizer)
        clip_grad_norm_(learner.module.parameters(), 1.0)
        learner.scaler.step(learner.optimizer)
        learner.scaler.update()
        learner.optimizer.zero_grad(set_to_none=True)


def _wait(device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    main()
