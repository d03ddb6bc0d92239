"""Semantic softmax compared with torch's cross_entropy, forward and backward, on the same logits in the same run.

    python benchmarks/losses.py

Interleaved rounds, medians, several runs: the first lets the machine settle, the spread shows how noisy it is. On a GPU
it also compiles the losses, and a second pair of columns shows the time of the GPU alone, with the logits not in its
cache and all operations queued before the first begins. At the end it prints how long it takes to read the logits and
write their gradient once, at the bandwidth of a large copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn import functional as F

from wn21k_zoo.training.losses import SemanticDistillationLoss, SemanticSoftmaxLoss
from wn21k_zoo.tree import SemanticTree

_COLUMNS = f"{'':41}until its end seen by the host     on the GPU alone"
_QUEUEING = 50_000_000  # cycles: about 30 ms, in which the host queues hundreds of operations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    on_gpu = arguments.device.startswith("cuda")

    # This makes glibc keep blocks of this size, as the activations of a network do. Otherwise calls may or may not get
    # new memory from the kernel each time, and cross_entropy takes 3 ms in one process and 11 ms in the next.
    torch.empty(31 * 2**18)
    tree = SemanticTree.load("fall11")
    logits = torch.randn(arguments.batch, len(tree), device=arguments.device, requires_grad=True)
    teacher = torch.randn(arguments.batch, len(tree), device=arguments.device)
    targets = torch.randint(0, len(tree), (arguments.batch,), device=arguments.device)
    cases = {"cross_entropy": lambda: F.cross_entropy(logits, targets)}
    for order in ("published", "level"):
        semantic = SemanticSoftmaxLoss(tree, order=order).to(arguments.device)
        distillation = SemanticDistillationLoss(tree, order=order).to(arguments.device)
        cases[f"semantic softmax, {order} order"] = lambda loss=semantic: loss(logits, targets)
        cases[f"distillation, {order} order"] = lambda loss=distillation: loss(logits, teacher)
        if not on_gpu:  # on a GPU the losses are plain operations anyway
            cases[f"  in plain operations, {order} order"] = lambda loss=semantic: loss._plain(logits, targets)
        else:
            for name, loss, other in (("semantic softmax", semantic, targets), ("distillation", distillation, teacher)):
                compiled = torch.compile(loss)
                cases[f"  {name} compiled, {order} order"] = lambda loss=compiled, other=other: loss(logits, other)

    def step(case) -> tuple[float, float]:
        """Seconds until the host sees the end, and seconds of the GPU alone."""
        logits.grad = None
        _wait(arguments.device)
        begin = time.perf_counter()
        cases[case]().backward()
        _wait(arguments.device)
        seconds = time.perf_counter() - begin
        logits.grad = None
        return seconds, _on_gpu_alone(lambda: cases[case]().backward(), arguments.device) if on_gpu else 0.0

    print(f"logits {list(logits.shape)} float32 on {arguments.device}, {arguments.threads} threads")
    for run in range(arguments.runs):
        rounds = [{case: step(case) for case in cases} for _ in range(arguments.rounds)][5:]
        medians = {
            case: [statistics.median(each) for each in zip(*(times[case] for times in rounds), strict=True)]
            for case in cases
        }
        print(f"run {run + 1}{_COLUMNS if on_gpu else ''}")
        for case, median in medians.items():
            shown = zip(median, medians["cross_entropy"], strict=True)
            columns = [f"{seconds * 1e3:8.2f} ms {seconds / plain:6.2f} times" for seconds, plain in shown if plain]
            print(f"  {case:44} {'   '.join(columns)}")
    if on_gpu:
        bandwidth = _bandwidth(arguments.device)
        print(f"bandwidth of a copy: {bandwidth / 1e9:,.0f} GB/s; reading the logits and writing their gradient once:")
        print(f"  {2 * logits.nbytes / bandwidth * 1e3:.3f} ms")


def _on_gpu_alone(action: Callable[[], None], device: str) -> float:
    """Seconds that its operations take, all of them queued before the first begins."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.device(device):
        torch.empty(2**28, dtype=torch.uint8, device=device).zero_()  # larger than its cache
        torch.cuda._sleep(_QUEUEING)
        begin.record()
        action()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _bandwidth(device: str) -> float:
    """Bytes per second read and written by a copy much larger than the cache."""
    source = torch.zeros(2**28, device=device)
    target = torch.empty_like(source)
    times = [_on_gpu_alone(lambda: target.copy_(source), device) for _ in range(13)]
    return 2 * source.nbytes / statistics.median(times[3:])


def _wait(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize(device)


if __name__ == "__main__":
    main()
