"""Plots of runs and of calibration."""

import json
import math
import os
import subprocess
import sys

import matplotlib
import pytest

from wn21k_zoo.errors import (
    DataOutputError,
)
from wn21k_zoo.training import plots
from wn21k_zoo.training.plots import plot_reliability, plot_runs


def test_a_picture_of_runs_has_each_figure_in_its_panel(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, output: drawn.append(figure))
    rows = [{"kind": "train", "step": 1, "loss": 5.0, "lr": 0.1, "images_per_second": 70.0},
            {"kind": "evaluation", "step": 1, "semantic_top1": 40.0, "top1": 30.0, "images_per_second": 9.0},
            {"kind": "train", "step": 2, "loss": 4.0, "lr": 0.2, "images_per_second": 80.0}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_runs([tmp_path], tmp_path / "x.png")
    panels = [[line.get_ydata() for line in axes.lines if len(line.get_ydata())] for axes in drawn[0].axes]
    assert [[list(map(float, each)) for each in panel] for panel in panels] == [
        [[5.0, 4.0]], [[0.1, 0.2]], [[40.0], [30.0]], [[70.0, 80.0]],
    ]  # fmt: skip


def test_a_picture_of_calibration_has_accuracy_over_confidence(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, output: drawn.append(figure))
    rows = [{"images": 10, "confidence": 20.0, "accuracy": 60.0}, {"images": 40, "confidence": 90.0, "accuracy": 75.0}]
    plot_reliability({"reliability": rows, "calibration_error": 20.0}, tmp_path / "x.png")
    (axes,) = drawn[0].axes
    assert [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines] == [
        ([0, 100], [0, 100]), ([20.0, 90.0], [60.0, 75.0]),
    ]  # fmt: skip
    assert [(bar.get_center()[0], bar.get_height()) for bar in axes.patches] == [(20.0, 5.0), (90.0, 20.0)]


def test_no_program_is_run_for_a_picture(tmp_path, monkeypatch):
    """Settings as in a matplotlibrc in the current folder."""
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    monkeypatch.setattr("matplotlib.texmanager.TexManager.make_dvi", lambda *_: pytest.fail("latex"))
    row = {"kind": "train", "step": 1, "loss": 5.0, "lr": 0.1, "images_per_second": 70.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row))
    assert plot_runs([tmp_path], tmp_path / "x.png").is_file()
    figures = {"reliability": [{"images": 10, "confidence": 20.0, "accuracy": 60.0}], "calibration_error": 20.0}
    assert plot_reliability(figures, tmp_path / "y.png").is_file()
    assert matplotlib.rcParams["text.usetex"]


def test_a_picture_is_named_as_one_in_either_case(tmp_path):
    line = {"kind": "train", "step": 1, "loss": 5.0, "lr": 0.1, "images_per_second": 70.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert plot_runs([tmp_path], tmp_path / "x.PNG").is_file()
    with pytest.raises(DataOutputError, match="pictures are PNG"):
        plot_runs([tmp_path], tmp_path / "x.pdf")


@pytest.mark.slow
@pytest.mark.parametrize(("named", "used"), [("no_such_backend", "agg"), ("pdf", "pdf")])
def test_a_backend_of_a_notebook_is_not_asked_for(named, used):
    code = """
from wn21k_zoo.training.plots import _figure_class
_figure_class()
import matplotlib.pyplot
print(matplotlib.get_backend())
"""
    environment = {**os.environ, "MPLBACKEND": named}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.stdout.strip().lower(), done.stderr) == (used, "")


def test_a_spike_of_a_long_run_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_save", lambda figure, output: drawn.append(figure))
    rows = [{"kind": "train", "step": step, "loss": 90.0 if step == 7777 else 1.0} for step in range(1, 20_001)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plot_runs([tmp_path], tmp_path / "x.png")
    steps, losses = drawn[0].axes[0].lines[0].get_data()
    assert len(steps) <= plots._POINTS
    assert (losses.min(), losses.max()) == (1.0, 90.0)
    assert steps[losses.argmax()] == pytest.approx(7777, abs=20)


def test_a_run_without_a_finite_loss_is_drawn_among_many(tmp_path):
    row = {"kind": "train", "step": 1, "loss": 5.0, "lr": 0.1, "images_per_second": 70.0}
    runs = [tmp_path / str(number) for number in range(11)]
    for run in runs:
        run.mkdir()
        loss = math.nan if run == runs[-1] else 5.0
        (run / "metrics.jsonl").write_text(json.dumps({**row, "loss": loss}) + "\n")
    assert plot_runs(runs, tmp_path / "x.png").is_file()


def test_many_runs_leave_room_for_their_curves(tmp_path):
    row = {"kind": "train", "step": 1, "loss": 5.0, "lr": 0.1, "images_per_second": 70.0}
    runs = [tmp_path / f"a run with a name of some length, number {number}" for number in range(60)]
    for run in runs:
        run.mkdir()
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({**row, "step": 9}) + "\n")
    picture = plot_runs(runs, tmp_path / "x.png")  # matplotlib warns where panels have no room, an error in tests
    assert picture.stat().st_size
