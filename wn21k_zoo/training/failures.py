"""Turn torch's errors in a failing run into errors that say what to do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from wn21k_zoo.errors import DataError, RecipeError, RunError, TrainingError, Wn21kError, first_line, is_out_of_memory

if TYPE_CHECKING:
    from wn21k_zoo.training.distributed import World
    from wn21k_zoo.training.recipe import Recipe

__all__ = ["explained", "is_of_a_worker", "is_of_the_device", "not_deterministic", "worker_gone"]

_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_NO_ROOM = "unable to allocate shared memory"  # of torch's allocator


def explained(problem: Exception, recipe: Recipe, world: World, images: int) -> Exception:
    """Return an error of ours for what users can do something about; anything else unchanged.

    Args:
        problem: What was raised within the run.
        recipe: The run's recipe.
        world: Its processes.
        images: Number of images that go through the network at a time.
    """
    if isinstance(problem, Wn21kError):
        return problem
    if is_of_a_worker(problem):
        return worker_gone(problem)
    if is_out_of_memory(problem):
        return RunError(
            f"The memory of {world.device} is not enough for {images} images at a time: set data.batch_per_device "
            f"below {images} (a step keeps its {recipe.data.batch_size} images), or model.gradient_checkpointing to "
            "true; the same command then resumes the run."
        )
    if world.size > 1 and _is_of_the_connection(problem):
        return TrainingError(
            f"The connection to the other processes failed: {first_line(problem).rstrip('.')}. If one of them is gone, "
            "its own message, or the system's log, says why."
        )
    if recipe.model.compile and isinstance(problem, torch._dynamo.exc.TorchDynamoException):
        return RunError(
            f"torch.compile failed: {first_line(problem)} It needs a C++ compiler and Python's headers, on GPUs also a "
            "C compiler and Triton; --set model.compile=false needs none of them, and the same command then resumes "
            "the run."
        )
    return not_deterministic(problem) or problem


def is_of_a_worker(problem: Exception) -> bool:
    """Whether this is torch's error for a loader process that is gone or has no shared memory.

    Torch raises the former in the middle of anything. Other failures in a process count as if they had occurred here.
    """
    text = str(problem)
    is_gone = "DataLoader worker" in text and not text.startswith("Caught ")
    return isinstance(problem, RuntimeError) and (is_gone or _NO_ROOM in text)


def worker_gone(problem: Exception) -> DataError:
    """Return our error for one of :func:`is_of_a_worker`."""
    if any(words in str(problem) for words in (_NO_ROOM, "out of shared memory")):
        return DataError(
            "/dev/shm, through which processes hand over images, is full: make it larger (docker run --shm-size=8g or "  # noqa: S108
            "--ipc=host; in Kubernetes an emptyDir with medium: Memory there), or use fewer workers (--workers), 0 "
            "for none. A training run then resumes where it was."
        )
    return DataError(
        f"A process that loads images is gone: {first_line(problem).rstrip('. ')}. If the machine was out of memory, "
        'use fewer workers (--workers); your own script must be under `if __name__ == "__main__":`. A training '
        "run then resumes where it was."
    )


def is_of_the_device(problem: Exception) -> bool:
    """Whether a device failed, or its memory or deterministic algorithms did not suffice: the images are not to blame.

    Errors of cuBLAS and cuDNN have no class of their own.
    """
    return (
        isinstance(problem, torch.AcceleratorError)
        or is_out_of_memory(problem)
        or not_deterministic(problem) is not None
        or any(words in str(problem) for words in ("CUDA error", "CUBLAS_STATUS", "cuDNN error", "CUDNN_STATUS"))
    )


def not_deterministic(problem: Exception) -> RecipeError | None:
    """Convert torch's error for an operation that run.deterministic forbids; None for any other."""
    if _WORKSPACE in str(problem):
        return RecipeError(
            f"This process used the GPU before {_WORKSPACE} was set, which run.deterministic needs: set it to :4096:8 "
            "and start again (in a notebook, restart the kernel), or set run.deterministic to false."
        )
    operation, forbidden, _ = str(problem).partition(" does not have a deterministic implementation")
    if not forbidden:
        return None
    return RecipeError(
        f"{operation}, which the network needs, has no deterministic implementation on this device; set "
        "run.deterministic to false."
    )


def _is_of_the_connection(problem: Exception) -> bool:
    """Whether a connection failed; gloo's errors can only be told by their text."""
    return isinstance(problem, torch.distributed.DistError) or (
        isinstance(problem, RuntimeError) and "gloo/" in str(problem)
    )
