"""What a run reports while it works: a bar or lines on stderr, metrics.jsonl, and TensorBoard when installed."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor

from wn21k_zoo.errors import RunError, first_line
from wn21k_zoo.messages import bar_column, bars, on_terminal, printable, say
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.state import RunFolder

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Reporter", "Window"]

_LOG = logging.getLogger(__name__)


class Reporter:
    """Reports the progress of a run; on all ranks but the leading one it is silent.

    Args:
        folder: Folder of the run; None: silent.
        total: Steps of the run.
        first: Step at which it begins.
    """

    def __init__(self, folder: RunFolder | None, total: int, first: int) -> None:
        self._file: IO[str] | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._board: Any = None
        self._told = False
        self._total, self._begin, self._first = total, time.perf_counter(), first
        if folder is None:
            return
        self._file = folder.metrics.open("a", encoding="utf-8", newline="\n")
        self._board = _tensorboard(folder, first)
        if on_terminal():
            from rich.progress import TextColumn

            self._bar = bars(bar_column(), TextColumn("{task.completed:,.0f}/{task.total:,.0f}  {task.fields[now]}"))
            self._task = self._bar.add_task("train", total=total, completed=first, now="")
            self._bar.start()

    def step(self, step: int) -> None:
        """Report that a step is done."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step)

    def train(self, values: dict[str, Any]) -> None:
        """Record and report metrics of the last steps."""
        self._record({"kind": "train", **values})
        done = values["step"] - self._first
        left = (time.perf_counter() - self._begin) / max(1, done) * (self._total - values["step"])
        text = (
            f"{_duration(left)} left  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
            f"{values['images_per_second']:,.0f} images/s  data {values['data_wait']:.0%}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, now=text)
        else:
            self.say(f"step {values['step']:,}/{self._total:,}  {text}")

    def evaluation(self, values: dict[str, Any]) -> None:
        """Record and report metrics of the validation images."""
        self._record({"kind": "evaluation", **values})
        shown = ("semantic_top1", "top1", "top5", "mean_lca_error")
        self.say(
            f"epoch {values['epoch']:g}  "
            + "  ".join(f"{name} {values[name]:.2f}" for name in shown if values.get(name) is not None)
        )

    def say(self, text: str) -> None:
        """Print a line on stderr."""
        if self._file is None:
            return
        if self._bar is not None:
            self._bar.console.print(f"wn21k: {printable(text)}", markup=False, highlight=False)
        else:
            say(text)

    def close(self) -> None:
        """Stop the bar and close the files."""
        if self._bar is not None:
            self._bar.stop()
        if self._file is not None:
            with contextlib.suppress(OSError):  # what a full disk did not take
                self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()

    def _record(self, values: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()
        except OSError as error:  # what is not written stays in the buffer
            if not self._told:
                self.say(f"{self._file.name} cannot be written ({error.strerror}); make room, or metrics are lost")
            self._told = True
        if self._board is None:
            return
        levels = {f"level_{depth:02}": value for depth, value in values.get("levels", {}).items()}
        try:
            for name, value in (values | levels).items():
                if isinstance(value, (int, float)) and name not in ("step", "epoch"):
                    self._board.add_scalar(f"{values['kind']}/{name}", value, values["step"])
        except OSError as error:  # in its thread, which has ended
            self._board = None
            self.say(f"TensorBoard's file cannot be written ({error.strerror}); its curves end here")


class Window:
    """Sums since the last line of metrics.

    Args:
        device: Device of the losses.

    Attributes:
        waited: Seconds spent waiting for images; the caller adds to it.
    """

    def __init__(self, device: torch.device) -> None:
        self.waited, self._elapsed, self._images, self._steps = 0.0, 0.0, 0, 0
        self._loss = torch.zeros((), device=device)
        self._begin = time.perf_counter()

    def begin(self) -> None:
        """Start the clock: steps begin, or go on after something else."""
        self._begin = time.perf_counter()

    def pause(self) -> None:
        """Stop the clock: something else begins, such as an evaluation."""
        self._elapsed += time.perf_counter() - self._begin

    def add(self, loss: Tensor, images: int) -> None:
        """Count a step and its images."""
        self._loss += loss
        self._steps, self._images = self._steps + 1, self._images + images

    def read(self) -> tuple[float, float, float]:
        """Return mean loss, images per second of all ranks and share of time spent waiting for images; then reset."""
        loss = float(self._loss) / self._steps  # waits for the device, so that the clock below is right
        now = time.perf_counter()
        elapsed = self._elapsed + now - self._begin
        figures = loss, self._images / elapsed, self.waited / elapsed
        self.waited, self._elapsed, self._images, self._steps, self._begin = 0.0, 0.0, 0, 0, now
        self._loss = torch.zeros_like(self._loss)
        return figures

    def share(self, world: World) -> None:
        """Set the losses so far to the mean over all ranks, on each of them; all ranks must call it together."""
        if world.size > 1:
            self._loss.fill_(world.mean(float(self._loss))[0])

    def state_dict(self) -> dict[str, Any]:
        """Return the part of the state that does not depend on the clock."""
        return {"loss": self._loss, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self._loss, self._steps = state["loss"].to(self._loss.device), state["steps"]


def _tensorboard(folder: RunFolder, first: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter

        # Readers then ignore what an earlier start logged for this step and later ones.
        return SummaryWriter(str(folder.path / "tensorboard"), purge_step=first + 1)
    except ImportError:  # not installed
        return None
    except OSError as error:
        raise RunError(f"{folder.path / 'tensorboard'} cannot be written: {first_line(error)}.") from None
    except Exception as error:  # a version that does not fit its protobuf or NumPy
        _LOG.warning("TensorBoard does not work here and is left out: %s", first_line(error))
        return None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
