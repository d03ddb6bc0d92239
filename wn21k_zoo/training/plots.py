"""Plots of how runs went and of how reliable confidences are. Needs the extra ``plot``."""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.errors import DataOutputError, MissingExtraError, RunError
from wn21k_zoo.files import check_writable, write_whole
from wn21k_zoo.training.state import RunFolder, names_of, read_lines

__all__ = ["check_picture", "plot_reliability", "plot_runs"]


_MARKERS = ("o", "s", "^", "v", "D", "x")  # with ten colours each
_PANELS = (  # kind of line, field, title, line style
    ("train", "loss", "training loss", "-"),
    ("train", "lr", "learning rate", "-"),
    ("evaluation", "semantic_top1", "semantic top-1 (dashed: top-1), %", "-"),
    ("evaluation", "top1", "", "--"),
    ("train", "images_per_second", "images per second", "-"),
)
_POINTS = 2000  # of a curve; more than a picture can show


def plot_runs(runs: Sequence[Path], output: Path) -> Path:
    """Plot loss, learning rate, accuracies and speed of runs over their steps, as PNG.

    Raises:
        RunError: A folder has no metrics.
        DataOutputError: The picture cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    curves = [_curves(run) for run in runs]
    check_picture(output)
    with _default_style():
        names = names_of(runs)
        columns = max(1, min(len(names), 160 // (max(map(len, names)) + 6)))
        figure, axes = _figure(2, 2, (11, 7 + 0.16 * -(-len(names) // columns)))
        places = [axes.flat[number] for number in (0, 1, 2, 2, 3)]  # both accuracies share a panel
        for place, (kind, name, title, style) in zip(places, _PANELS, strict=True):
            for number, each in enumerate(curves):
                marker = _MARKERS[number // 10 % len(_MARKERS)] if kind == "evaluation" or number > 9 else ""
                if (curve := each.get((kind, name))) is not None:
                    place.plot(
                        *curve,
                        color=f"C{number % 10}",
                        linestyle=style,
                        marker=marker,
                        markersize=3,
                        markevery=None if kind == "evaluation" else 0.1,
                    )
            if title:
                place.set_title(title, fontsize=10)
            place.set_xlabel("step", fontsize=8)
            place.grid(True, alpha=0.3)
        handles = [
            axes.flat[0].plot(
                [], [], color=f"C{number % 10}", marker=_MARKERS[number // 10 % len(_MARKERS)], markersize=3, label=name
            )[0]
            for number, name in enumerate(names)
        ]
        figure.legend(handles=handles, fontsize=7, loc="outside lower center", ncols=columns)
        return _save(figure, output)


def plot_reliability(figures: Mapping[str, Any], output: Path) -> Path:
    """Plot a reliability diagram (arXiv 1706.04599): accuracy over confidence, and images per bin, as PNG.

    Args:
        figures: With ``reliability`` and ``calibration_error``, as from :func:`wn21k_zoo.training.evaluate.evaluate`.
        output: The file to write.

    Raises:
        DataOutputError: The picture cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    with _default_style():
        figure, axes = _figure(1, 1, (5, 5))
        place, rows = axes.flat[0], figures["reliability"]
        place.plot([0, 100], [0, 100], color="grey", linestyle=":", label="what confidence promises")
        place.plot(
            [row["confidence"] for row in rows], [row["accuracy"] for row in rows], marker="o", label="accuracy per bin"
        )
        largest = max((row["images"] for row in rows), default=1)
        place.bar(
            [row["confidence"] for row in rows], [20 * row["images"] / largest for row in rows],
            width=5, alpha=0.3, label="share of images (not to scale)",
        )  # fmt: skip
        place.set(xlim=(0, 100), ylim=(0, 100), xlabel="confidence, %", ylabel="right, %")
        place.set_title(
            f"{figures.get('model', '')}\nexpected calibration error {_shown(figures['calibration_error'])}", fontsize=9
        )
        place.legend(fontsize=8)
        return _save(figure, output)


def _shown(error: float | None) -> str:
    return "unknown" if error is None else f"{error:.1f} %"


def _thinned(points: list[tuple[int, float]]) -> NDArray[np.float64]:
    """Steps and values of a curve, shape [2, n]; of many neighbours the extremes, so that spikes stay."""
    steps, values = np.array(points, np.float64).T
    if len(steps) <= _POINTS:
        return np.stack([steps, values])
    firsts = np.arange(0, len(steps), -(-2 * len(steps) // _POINTS))
    ends = np.stack([np.minimum.reduceat(values, firsts), np.maximum.reduceat(values, firsts)], 1)
    return np.stack([steps[firsts].repeat(2), ends.ravel()])


def _curves(run: Path) -> dict[tuple[str, str], NDArray[np.float64]]:
    """The curve of each panel; not the lines themselves, which take much more memory."""
    folder = RunFolder(run)
    if not folder.metrics.is_file():
        raise RunError(f"{folder.path} holds no run (no metrics.jsonl).")
    lines = read_lines(folder.metrics)
    if not lines:
        raise RunError(f"{folder.metrics} has no lines yet.")
    curves = {}
    for kind, name, *_ in _PANELS:
        values = [(line["step"], line.get(name)) for line in lines if line["kind"] == kind]
        # Markers at regular distances need a finite value.
        if points := [(step, y) for step, y in values if isinstance(y, (int, float)) and math.isfinite(y)]:
            curves[kind, name] = _thinned(points)
    return curves


def check_picture(path: Path) -> None:
    """Check that a picture can be made and written, before the work for it.

    Raises:
        DataOutputError: It cannot be written, or its name does not end in .png.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() != ".png":
        raise DataOutputError(f"{path}: pictures are PNG; name a file that ends in .png.")
    check_writable(path)
    _figure_class()


def _figure_class() -> Any:
    # No backend is needed; if a notebook's MPLBACKEND is not installed here, matplotlib would fail to import.
    backend = os.environ.pop("MPLBACKEND", None) if "matplotlib" not in sys.modules else None
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("A plot", "plot") from error
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend  # as matplotlib does itself
    return Figure


@contextlib.contextmanager
def _default_style() -> Iterator[None]:
    """Within the block, ignore any matplotlibrc; the current folder may have one."""
    _figure_class()
    from matplotlib import style

    with style.context("default"):
        yield


def _figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    figure = _figure_class()(figsize=size, layout="constrained")  # without pyplot: no window, no global state
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, output: Path) -> Path:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    write_whole(output, picture.getvalue(), DataOutputError)
    return output
