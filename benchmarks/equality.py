"""Losses, gradients and the metric against the published values (tests/data/published_losses.json), as a table.

    python benchmarks/equality.py

For a list of values, the row shows the first value and the largest difference.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.training.published_losses import CLOSE, LOSSES, ORDERS, WAYS, loss_values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = parser.parse_args().device
    print(f"on {device}; the tests allow a relative {CLOSE['rtol']:g} and an absolute {CLOSE['atol']:g}")
    print(
        f"{'quantity':17}{'values':>6}{'published':>16}{'ours':>16}{'relative':>10}{'absolute':>10}{'of allowed':>12}"
    )
    for case in sorted(LOSSES):
        for order in ORDERS:
            for way in WAYS:
                print(f"{case}, logits in {order} order, {'as it is' if way == 'forward' else 'in plain operations'}")
                for quantity, value in loss_values(case, order, way, device).items():
                    print(_row(quantity, np.array(LOSSES[case][quantity], float), np.array(value, float)))


def _row(quantity: str, published: np.ndarray, ours: np.ndarray) -> str:
    published, ours = published.ravel(), ours.ravel()
    off = np.abs(ours - published)
    relative = (off / np.maximum(np.abs(published), np.finfo(float).tiny)).max()
    allowed = (off / (CLOSE["atol"] + CLOSE["rtol"] * np.abs(published))).max()
    values = f"{quantity:17}{len(ours):4}{published[0]:16.9g}{ours[0]:16.9g}"
    return f"  {values}{relative:10.1e}{off.max():10.1e}{allowed:12.1%}"


if __name__ == "__main__":
    main()
