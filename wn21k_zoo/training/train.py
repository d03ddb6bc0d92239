"""Entry point of a run: ``torchrun -m wn21k_zoo.training.train --recipe FILE[:function] --data DIR --output DIR``.

Without torchrun, ``python -m wn21k_zoo.training.train`` runs one process. Exit codes: 0 finished, 1 failed, 2 usage,
143 preempted (SIGTERM) and 130 interrupted, both with a checkpoint; the same command continues from it.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import traceback
from typing import NoReturn

from wn21k_zoo.errors import RecipeError, RunError, message_of
from wn21k_zoo.files import local_path
from wn21k_zoo.messages import forget_unheard, say
from wn21k_zoo.training.signals import Signals
from wn21k_zoo.training.status import mark_preempted

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m wn21k_zoo.training.train",
        description="Train a recipe; a run begun before in the same output folder is resumed.",
    )
    parser.add_argument(
        "--recipe",
        required=True,
        metavar="FILE.py[:FUNCTION[:TEXT]]",
        help="calls FUNCTION (default: the first), with TEXT if given; FILE.py may be a name that `wn21k train list` "
        "shows; or a run's recipe.json",
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="shards, a URL of them, or a folder of classes")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the run, seen by all processes")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="such as optimizer.lr=1e-3")
    parser.add_argument("--debug", action="store_true", help="two small steps with random weights, on the CPU")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("-j", "--workers", type=int, help="processes per rank that load images; default: by cores")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(format="wn21k: %(message)s", level=logging.WARNING)
    signals = Signals(lambda until: _leave(chosen.output))
    with signals.listening():
        try:
            return _run(chosen, signals)
        except Exception as error:
            if (what := message_of(error)) is None:
                raise
            rank = os.environ.get("RANK", "0")
            say(f"{f'rank {rank}: ' if rank != '0' else ''}{what}")
            return getattr(error, "exit_code", 1)
        except KeyboardInterrupt:
            say("interrupted")
            return 130


def _run(chosen: argparse.Namespace, signals: Signals) -> int:
    from wn21k_zoo.training.recipe_files import load_recipe, override

    recipe = override(load_recipe(chosen.recipe), chosen.set)
    # After the recipe: its extra installs all that these need.
    from wn21k_zoo.training.distributed import join, launched
    from wn21k_zoo.training.engine import Preempted, train

    if chosen.workers is not None and chosen.workers < 0:
        raise RecipeError("--workers must be at least 0.")
    if chosen.debug:
        recipe = recipe.debug(launched("WORLD_SIZE", 1))
    with join("cpu" if chosen.debug else chosen.device, recipe.run.deterministic) as world:
        try:
            train(recipe, chosen.data, chosen.output, world, workers=chosen.workers, signals=signals)
        except Preempted as end:
            if world.leads:
                say("stopped with a checkpoint; the same command resumes it")
            return end.code
    return 0


def _leave(output: str) -> None:
    """Mark the run of a process that is told to stop before the run begins."""
    if os.environ.get("RANK", "0") == "0":
        mark_preempted(local_path(output, RunError))
        say("told to stop before the run began; the same command starts it")


def _end(code: int) -> NoReturn:
    """End this process; one of several without shutting the interpreter down.

    At shutdown, a gloo thread that still holds a tensor may abort a process whose run is finished, and torchrun reports
    a failure (https://github.com/pytorch/pytorch/pull/179291). All files are closed by now.
    """
    forget_unheard()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(code)
    logging.shutdown()
    for child in multiprocessing.active_children():  # they load images that are no longer needed
        child.kill()
    os._exit(code)


if __name__ == "__main__":
    try:
        code = main()
    except Exception:
        traceback.print_exc()
        code = 1
    _end(code)
