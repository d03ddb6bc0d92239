"""Runs many independent tasks: in processes on this machine, or as Ray tasks on a cluster."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

from wn21k_zoo.errors import DataError, MissingExtraError, Wn21kError, first_line

__all__ = ["Engine", "count_cores", "no_processes", "run_tasks"]

Engine = Literal["local", "ray"]
Result = TypeVar("Result")


def run_tasks(
    function: Callable[..., Result],
    tasks: Iterable[tuple[Any, ...]],
    *,
    workers: int | None,
    engine: Engine = "local",
    address: str | None = None,
) -> Iterator[Result]:
    """Yield results of ``function(*task)`` in the order in which they are ready.

    Tasks are drawn from the iterable as workers become free, at most two per worker, so it may be endless. Closing the
    iterator, or an error in a task, stops all workers.

    Args:
        function: A function at the top level of a module.
        tasks: The arguments, to be pickled.
        workers: Processes on this machine, or concurrent Ray tasks; None: one per core.
        engine: ``local`` or ``ray``.
        address: Of a Ray cluster; default: ``RAY_ADDRESS`` if set, else a temporary cluster on this machine.

    Raises:
        DataError: A local worker died.
        MissingExtraError: Ray is not installed.
    """
    if engine == "ray":
        return _run_on_ray(function, tasks, workers, address)
    workers = workers or count_cores()
    if workers == 1:
        return (function(*task) for task in tasks)
    return _run_in_processes(function, tasks, workers)


def count_cores() -> int:
    """Cores that this process may use; in a container those that it is given (``docker --cpus``)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, _quota(Path("/sys/fs/cgroup")) or cores))


def _quota(groups: Path) -> int | None:
    """CPU quota of a control group (version 2, else 1), rounded up; None without a limit or a control group."""
    for files in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with contextlib.suppress(OSError, ValueError, ZeroDivisionError):  # "max" is not a number
            quota, period = (int(word) for file in files for word in (groups / file).read_text().split())
            return math.ceil(quota / period) if quota > 0 else None
    return None


def no_processes(problem: OSError, instead: str) -> DataError:
    """The error if no processes can be started."""
    of_memory = problem.errno in (errno.EROFS, errno.ENOENT, errno.EACCES, errno.ENOSPC)
    place = "make sure that /dev/shm exists and is writable, or " if of_memory else ""
    return DataError(f"Processes cannot be started here: {first_line(problem)}; {place}use {instead}.")


def _run_in_processes(
    function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], workers: int
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")  # forking a process that has threads may hang
    others = set(multiprocessing.active_children())
    if sys.platform == "win32":
        workers = min(workers, 61)  # Windows cannot wait for more
    try:
        pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    except OSError as error:
        raise no_processes(error, "one (--workers 1)") from error
    running: set[concurrent.futures.Future[Result]] = set()
    try:
        for task in tasks:
            running.add(pool.submit(function, *task))
            if len(running) >= 2 * workers:
                yield from _done(running)
        while running:
            yield from _done(running)
    except concurrent.futures.process.BrokenProcessPool:
        raise DataError(
            "A worker process died. If the machine was out of memory, use fewer workers (--workers); in a script of "
            "your own, call this below if __name__ == '__main__':, as workers import the script. What is finished is "
            "kept: run the same again."
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()


def _done(running: set[concurrent.futures.Future[Result]]) -> Iterator[Result]:
    """Wait for results and take them out of ``running``; in short waits, so that Windows notices Ctrl-C in between."""
    done: set[concurrent.futures.Future[Result]] = set()
    while not done:
        done, _ = concurrent.futures.wait(running, timeout=0.5, return_when=concurrent.futures.FIRST_COMPLETED)
    running -= done
    yield from (future.result() for future in done)


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, end when the parent is gone, and silence libjpeg's messages."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    with contextlib.suppress(OSError):
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 2)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _run_on_ray(
    function: Callable[..., Result], tasks: Iterable[tuple[Any, ...]], workers: int | None, address: str | None
) -> Iterator[Result]:
    try:
        import ray
    except ImportError as error:  # also a broken one
        raise MissingExtraError("The Ray engine", "ray") from error
    wanted = address or os.environ.get("RAY_ADDRESS")
    ours = not ray.is_initialized()
    if ours:
        local: dict[str, Any] = {} if wanted else {"num_cpus": workers or count_cores(), "include_dashboard": False}
        _refuse_deaf(wanted)
        try:
            with _children_deaf_to_interrupts():
                ray.init(address=wanted, log_to_driver=False, configure_logging=False, **local)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise DataError(
                f"No Ray cluster can be used at {wanted or 'this machine'}: {first_line(error)}. If it asks for a "
                "token, this machine needs the same one (RAY_AUTH_MODE, RAY_AUTH_TOKEN)."
            ) from None
    try:
        workers = workers or max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
        remote = ray.remote(num_cpus=1, max_retries=5)(function)  # a task whose worker dies is run again
        running: list[Any] = []
        for task in tasks:
            running.append(remote.remote(*task))
            if len(running) >= 2 * workers:
                done, running = ray.wait(running, num_returns=1)
                yield from ray.get(done)
        while running:
            done, running = ray.wait(running, num_returns=1)
            yield from ray.get(done)
    except ray.exceptions.RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Wn21kError) else None
        raise cause or DataError(f"A Ray task failed: {first_line(error.cause or error)}") from None
    except ray.exceptions.RayError as error:
        raise DataError(
            f"Ray failed: {first_line(error)}. What is finished is kept: run the same command again."
        ) from None
    finally:
        if ours:
            ray.shutdown()


@contextlib.contextmanager
def _children_deaf_to_interrupts() -> Iterator[None]:
    """Within, new processes ignore Ctrl-C: a terminal sends it to all, and Ray's, ending, would take this one along."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


def _refuse_deaf(address: str | None) -> None:
    """Refuse an address where nobody answers: Ray itself would end the process, after minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto", "local" and the like
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        raise DataError(
            f"No Ray cluster answers at {address} ({error}); check --ray-address and RAY_ADDRESS."
        ) from None
