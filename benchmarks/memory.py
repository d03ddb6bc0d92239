"""Memory of a training step as estimated by `wn21k train plan` and as counted by torch, on the CPU in fp32.

    python benchmarks/memory.py

Weights, gradients, Adam's moments, and the activations kept for the backward pass, at their peak.
"""

from __future__ import annotations

import argparse

import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F

from wn21k_zoo import convert
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.plan import plan
from wn21k_zoo.training.presets import ARCHITECTURES
from wn21k_zoo.training.recipe import Recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architectures", nargs="*", default=sorted(ARCHITECTURES), help="timm's names; default: ours")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--classes", choices=("imagenet1k", "fall11"), default="fall11")
    arguments = parser.parse_args()
    for architecture in arguments.architectures:
        for checkpointing in (False, True):
            recipe = Recipe(name="benchmark", model={"architecture": architecture})
            recipe.data.label_space = arguments.classes
            recipe.data.batch_size = recipe.data.batch_per_device = arguments.batch
            recipe.model.gradient_checkpointing, recipe.run.precision = checkpointing, "fp32"
            recipe.optimizer.name, recipe.run.ema_decay = "adam", None
            guess = plan(recipe, gpus=1).memory_gb
            classes = len(LabelSpace.load(arguments.classes))
            counted = _counted(architecture, arguments.batch, checkpointing, classes)
            how = "with" if checkpointing else "without"
            print(
                f"{architecture:28} {how:7} gradient checkpointing: {guess:5.2f} GB guessed, {counted:5.2f} counted, "
                f"ratio {guess / counted:.2f}",
                flush=True,
            )


def _counted(architecture: str, batch: int, checkpointing: bool, classes: int) -> float:
    module = convert.build(architecture, num_classes=classes).train()
    module.set_grad_checkpointing(checkpointing)
    optimizer = torch.optim.Adam(module.parameters())
    images, targets = torch.rand(batch, 3, 224, 224), torch.randint(0, classes, (batch,))
    tracker = MemTracker()
    tracker.track_external(module, optimizer)
    with tracker:
        for _ in range(2):  # in the first step the optimizer has no moments yet
            F.cross_entropy(module(images), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
    return sum(parts["Total"] for parts in tracker.get_tracker_snapshot("peak").values()) / 1e9


if __name__ == "__main__":
    main()
