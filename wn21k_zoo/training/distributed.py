"""One process, or many started by torchrun: which one this is, and how all of them agree."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from wn21k_zoo.errors import RunError, TrainingError, Wn21kError, first_line
from wn21k_zoo.messages import say
from wn21k_zoo.running import select_device

__all__ = ["NCCL_ALGORITHMS", "World", "join", "launched"]

_LONG = 30.0  # seconds

# Sums computed by switches vary (https://github.com/NVIDIA/nccl/issues/1497); NCCL reads this when a process group is
# created, and torch sets it by itself only if it was already deterministic then.
NCCL_ALGORITHMS, _DETERMINISTIC = "NCCL_ALGO", "^NVLS,NVLSTree"


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Attributes:
        rank: Rank of this process.
        size: Number of processes.
        device: Device that this process computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.rank == 0

    def any(self, value: bool) -> bool:
        """Whether the value is true on any rank; waits for all."""
        if self.size == 1:
            return value
        flag = torch.tensor(value, dtype=torch.int32, device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.any(False)

    def mean(self, *values: float) -> list[float]:
        """Return the mean of each value over ranks; waits for all."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [value / self.size for value in total.tolist()]

    def broadcast(self, value: int) -> int:
        """Return the leading rank's value; waits for all."""
        if self.size == 1:
            return value
        number = torch.tensor(value, device=self.device)
        dist.broadcast(number, 0)
        return int(number)

    def agree(self, what: str, value: object) -> None:
        """Check that all ranks have the same JSON-serialisable value; waits for all.

        Raises:
            TrainingError: On every rank, if the values differ.
        """
        digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=7).digest()
        mine = int.from_bytes(digest, "big")
        if self.any(self.broadcast(mine) != mine):
            raise TrainingError(f"The processes of this run have different {what}; start all of them alike.")

    def lead(self, action: Callable[[], None]) -> None:
        """Let the leading rank run an action while the others wait; if it fails, all fail.

        Raises:
            Wn21kError: What the action raised; on the other ranks a TrainingError.
        """
        problem: Wn21kError | None = None
        if self.leads:
            try:
                action()
            except Wn21kError as error:
                problem = error
            except OSError as error:  # a full disk, or a folder that is not writable
                problem = RunError(f"{first_line(error)}.")
        failed = self.any(problem is not None)
        if problem is not None:
            raise problem
        if failed:
            raise TrainingError("The leading process stopped; its message says why.")


def launched(name: str, default: int) -> int:
    """Read a number from one of torchrun's variables; other launchers set -1 for none.

    Raises:
        TrainingError: The variable is set to something else.
    """
    text = os.environ.get(name, str(default))
    try:
        return int(text) if int(text) >= 0 else default
    except ValueError:
        raise TrainingError(f"{name} is set to {text!r}, which is not a number; unset it, or use torchrun.") from None


@contextlib.contextmanager
def _told_of_waiting(size: int) -> Iterator[None]:
    """Report what a process is waiting for if it waits long for the others inside this context."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
    message = f"waiting for all {size} processes at {place}, as set by WORLD_SIZE, RANK and MASTER_ADDR"
    timer = threading.Timer(_LONG, say, [message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextlib.contextmanager
def join(device: str | torch.device = "auto", deterministic: bool = False) -> Iterator[World]:
    """Join this process's world while in the context: the one given by torchrun's variables, or itself alone.

    On CUDA each rank uses the GPU of its local rank, which becomes torch's current one, and NCCL; otherwise gloo. If
    the program has already created a process group, that group and the current GPU are used.

    Args:
        device: auto, cpu, cuda, cuda:N or mps.
        deterministic: Whether sums over ranks must be the same each time.

    Raises:
        TrainingError: There are more ranks than GPUs on this machine, the device cannot be shared by processes, the
            others cannot be reached, the program's process group is for other devices, or a variable is not a number.
    """
    if dist.is_available() and dist.is_initialized():
        yield _of_the_group(select_device(device))
        return
    size, local = launched("WORLD_SIZE", 1), launched("LOCAL_RANK", 0)
    if str(device) in ("auto", "cuda") and torch.cuda.is_available() and local < torch.cuda.device_count():
        torch.cuda.set_device(local)  # first of all, or each rank would use memory of the first GPU
    chosen = select_device(device)
    if size > 1 and str(device) != "auto" and (chosen.type == "mps" or torch.device(device).index is not None):
        raise TrainingError(
            f"{size} processes cannot share the device {device}; use cpu or cuda, or specify no device."
        )
    if chosen.type == "mps" and size > 1:
        chosen = torch.device("cpu")
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local if chosen.index is None else chosen.index)
        if chosen.index >= torch.cuda.device_count():
            raise TrainingError(
                f"Local rank {local} has no GPU: there are {torch.cuda.device_count()}; start as many processes per "
                "machine as it has GPUs (torchrun --nproc-per-node)."
            )
        torch.cuda.set_device(chosen)
    launched("RANK", 0)
    if "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        yield World(0, 1, chosen)
        return
    with _same_sums() if deterministic else contextlib.nullcontext():
        nccl = chosen.type == "cuda" and dist.is_nccl_available()  # Windows has no NCCL
        try:
            with _told_of_waiting(size):
                dist.init_process_group(
                    "nccl" if nccl else "gloo",
                    timeout=datetime.timedelta(minutes=30),
                    device_id=chosen if nccl else None,
                )
        except (RuntimeError, ValueError) as error:
            hint = ""
            if nccl and size > 1 and "LOCAL_RANK" not in os.environ:
                hint = (
                    " (LOCAL_RANK is not set; of several processes on a machine each needs its own, as torchrun gives.)"
                )
            raise TrainingError(f"The other processes cannot be reached: {first_line(error)}{hint}") from error
        yield World(dist.get_rank(), dist.get_world_size(), chosen)
    dist.destroy_process_group()  # not after an error: it might wait for ranks that wait for this one


@contextlib.contextmanager
def _same_sums() -> Iterator[None]:
    """Keep NCCL from using algorithms whose sums vary while in the context, unless the user chose algorithms."""
    before = os.environ.get(NCCL_ALGORITHMS)
    os.environ.setdefault(NCCL_ALGORITHMS, _DETERMINISTIC)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(NCCL_ALGORITHMS, None)


def _of_the_group(chosen: torch.device) -> World:
    if chosen.type == "mps" and dist.get_world_size() > 1:
        chosen = torch.device("cpu")
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    if dist.get_world_size() > 1 and f"{chosen.type}:" not in (known := dist.get_backend_config()):
        raise TrainingError(
            f"The program's process group has no backend for {chosen.type} (it has {known}); create the group with "
            "one, or use a device that it has."
        )
    return World(dist.get_rank(), dist.get_world_size(), chosen)
