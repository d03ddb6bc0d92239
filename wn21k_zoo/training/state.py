"""The folder of a run: its recipe, checkpoints (written atomically), metrics, and how it ended.

::

    OUTPUT/
      recipe.json          all fields, as they were resolved
      data.json            what it is trained on: classes, images; the network arguments that its start states
      status.json          running, with the step of the newest checkpoint; or preempted, finished, failed, and where
      metrics.jsonl        a line per logged step and per evaluation
      checkpoints/step-00001234.pt, best.pt
      tensorboard/         when TensorBoard is installed
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wn21k_zoo.errors import RecipeError, RunError, UnknownLabelSpaceError, first_line
from wn21k_zoo.exclusive import exclusive
from wn21k_zoo.files import (
    RECIPE_FILE,
    expanded,
    is_hidden,
    is_run,
    make_folder,
    parse_json,
    refuse_compressed,
    replace,
    write_whole,
)
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.training.status import ELSEWHERE, STATUS_FILE, read_status, write_status, write_text

__all__ = ["DATA_FILE", "FORMAT", "RunFolder", "names_of", "read_checkpoint", "read_lines", "score"]

FORMAT = 3
"""Version of a checkpoint's content; it changes when something in it changes its meaning."""

DATA_FILE = "data.json"
_LOG = logging.getLogger(__name__)
_BUSY_SECONDS = 2.0  # that a run which is just ending may still take
_OURS = {"checkpoints", DATA_FILE, "metrics.jsonl", RECIPE_FILE, STATUS_FILE, "tensorboard", "plot.png"}
# What may differ when a run is resumed: it changes where and how fast something is computed, not what.
_FREE = {
    ("model", "compile"),
    ("model", "gradient_checkpointing"),
    ("data", "label_space"),  # its name or file; the digest shows whether its classes are the same
    ("loss", "teacher"),  # where it is stored; its digest shows whether its predictions are the same
    ("data", "batch_per_device"),
    ("data", "max_bad"),
    ("run", "checkpoint_minutes"),
    ("run", "keep"),
    ("run", "evaluate_every"),
    ("run", "evaluate_batches"),
    ("run", "log_every"),
}


class RunFolder:
    """The output folder of a run.

    Args:
        path: The folder; created when something is written.

    Raises:
        RunError: No folder can have this name, or it begins with ~ and an unknown user name.
    """

    def __init__(self, path: Path) -> None:
        self.path = expanded(path, RunError).absolute()
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.best = self.checkpoints / "best.pt"

    def check(self, recipe: Recipe, data: Mapping[str, Any]) -> None:
        """Check that the folder is new or empty, or holds the same run; a run without a checkpoint may start over.

        Raises:
            RunError: It holds another run or something else.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"{self.path} is a file; name a folder for the output.")
        if not self.path.is_dir():
            return
        try:
            names = {entry.name for entry in self.path.iterdir() if not is_hidden(entry.name)}
        except OSError as error:
            raise RunError(f"{self.path} cannot be read: {first_line(error)}; name another output folder.") from None
        if (foreign := names - _OURS) and RECIPE_FILE not in names:
            raise RunError(
                f"{self.path} holds {min(foreign)}, which no run wrote; name an empty or new folder for the output."
            )
        if (begun := self.begun()) is not None:
            self._same(begun, recipe, data)

    def begin(self, recipe: Recipe, data: Mapping[str, Any]) -> None:
        """Write the recipe and data of the run, and remove temporary files of a killed one.

        Raises:
            RunError: The folder cannot be written.
        """
        make_folder(self.checkpoints, RunError, ELSEWHERE)
        for left in self.checkpoints.glob("*.tmp*"):
            with contextlib.suppress(OSError):
                left.unlink(missing_ok=True)
        write_text(self.path / RECIPE_FILE, recipe.to_json())
        write_text(self.path / DATA_FILE, json.dumps(dict(data), indent=1) + "\n")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Within, no other run writes here.

        Raises:
            RunError: Another run does.
        """
        make_folder(self.path, RunError, ELSEWHERE)
        busy = f"Another run is writing to {self.path}; wait for it, or name another output folder."
        with exclusive(self.path / ".lock", RunError, ELSEWHERE, busy=busy, seconds=_BUSY_SECONDS):
            yield

    def recipe(self) -> Recipe:
        """The recipe of the run.

        Raises:
            RunError: There is no run.
        """
        file = self.path / RECIPE_FILE
        try:
            return Recipe.from_json(file.read_text(encoding="utf-8"))
        except PermissionError as error:
            raise RunError(f"{file} cannot be read ({error.strerror}); ask its owner, or name another run.") from None
        except OSError:
            raise RunError(f"{self.path} holds no run (no recipe.json).") from None
        except (RecipeError, UnicodeDecodeError) as error:
            raise RunError(f"{file} is damaged ({error}); repair it, or name another run.") from None

    def begun(self) -> Recipe | None:
        """The recipe of a run that has a checkpoint; None without one.

        Raises:
            RunError: The recipe is damaged or missing.
        """
        if not self.steps():
            return None
        if not is_run(self.path):
            raise RunError(
                f"{self.path} has checkpoints and no {RECIPE_FILE}; restore that, or name another output folder."
            )
        return self.recipe()

    def start_arguments(self) -> dict[str, Any] | None:
        """The network arguments that the start of a run states; None if it has no checkpoint, or they are not known.

        Raises:
            RunError: Its recipe is damaged.
        """
        if self.begun() is None:
            return None
        with contextlib.suppress(RunError):
            found = self.data().get("start_arguments")
            return found if isinstance(found, dict) else None
        return None

    def data(self) -> dict[str, Any]:
        """What the run is trained on.

        Raises:
            RunError: There is no run.
        """
        with self._undamaged():
            try:
                return dict[str, Any](parse_json((self.path / DATA_FILE).read_text(encoding="utf-8")))
            except OSError:
                raise RunError(f"{self.path} holds no run (no {DATA_FILE}).") from None

    def classes(self) -> tuple[LabelSpace | None, tuple[str, ...]]:
        """Its label space, None if the classes are not synsets, and a wnid or a folder's name per output.

        Raises:
            RunError: There is no run, or its record of the classes is damaged.
        """
        with self._undamaged():
            data = self.data()
            name, names = data["label_space"], data["class_names"]  # for a shipped label space the name alone
            if name is None:
                return None, tuple(names)
            space = LabelSpace.load(name) if names is None else LabelSpace(name, tuple(names))
            return space, space.wnids

    def training_images(self) -> int:
        """The number of images in an epoch.

        Raises:
            RunError: There is no run, or its record of the images is damaged.
        """
        with self._undamaged():
            return int(self.data()["images"]["train"])

    @contextlib.contextmanager
    def _undamaged(self) -> Iterator[None]:
        """Within, unexpected content of data.json is reported as damage."""
        try:
            yield
        except (KeyError, TypeError, ValueError, OverflowError, UnknownLabelSpaceError) as error:
            raise RunError(f"{self.path / DATA_FILE} is damaged ({first_line(error)}).") from None

    @property
    def knows_its_data(self) -> bool:
        """Whether it says what it is trained on, as every run does that has begun."""
        return (self.path / DATA_FILE).is_file()

    def status(self) -> dict[str, Any]:
        """The status of the run; empty if it never began."""
        return read_status(self.path)

    def set_status(self, state: str, step: int, **more: Any) -> None:
        """Write the status of the run."""
        write_status(self.path, state, step, **more)

    def steps(self) -> list[Path]:
        """The checkpoints of steps, newest first."""
        return sorted(self.checkpoints.glob("step-*.pt"), reverse=True)

    def newest_step(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        return next((int(path.stem.removeprefix("step-")) for path in self.steps()), 0)

    def newest(self) -> dict[str, Any] | None:
        """The newest readable checkpoint; others are skipped with a warning.

        Raises:
            RunError: There are some, and none can be read.
        """
        problem = ""
        for path in self.steps():
            try:
                return read_checkpoint(path)
            except RunError as error:
                problem = problem or str(error)
                _LOG.warning("%s", error)
        if problem:
            raise RunError(f"No checkpoint of {self.path} can be read; the newest: {problem}")
        return None

    def has_best(self) -> bool:
        """Whether the best checkpoint is there; a damaged one is moved aside, and either is warned of.

        Raises:
            OSError: It cannot be read or moved.
        """
        there = self.best.exists()
        if there and _is_whole(self.best):
            return True
        what = "is damaged" if there else "is gone"
        _LOG.warning("%s %s; the next evaluation counts as the best so far", self.best, what)
        if there:
            replace(self.best, self.best.with_suffix(".damaged"))
        return False

    def cut(self, step: int, evaluated: int) -> None:
        """Drop what will be computed again: what came after a step, or after the last evaluation that counts.

        Raises:
            RunError: The folder cannot be written.
        """
        after = [path for path in self.steps() if path.name > f"step-{step:08d}.pt"]
        try:
            for former in self.checkpoints.glob("step-*.damaged") if after else ():
                former.unlink()  # they are large, so only the last ones are kept
            for path in after:
                path.replace(path.with_suffix(".damaged"))
        except OSError as error:
            raise RunError(f"A damaged checkpoint cannot be moved aside: {first_line(error)}.") from None
        if not self.metrics.is_file():
            return
        last = {"evaluation": evaluated}
        kept = [line for line in read_lines(self.metrics) if line["step"] <= last.get(line["kind"], step)]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if os.access(self.metrics, os.W_OK):
            write_text(self.metrics, text)
        else:  # another user's, in a folder of a group; lines will be appended
            write_whole(self.metrics, text, RunError)

    def _same(self, begun: Recipe, recipe: Recipe, data: Mapping[str, Any]) -> None:
        theirs, ours = (each.model_dump(mode="json", exclude={"name"}) for each in (begun, recipe))
        for section, fields in ours.items():
            for field, now in fields.items():
                if (before := theirs[section][field]) != now and (section, field) not in _FREE:
                    how = "or continue with the recipe.json in it."
                    if section in ("loss", "optimizer", "schedule") and self.status().get("state") == "finished":
                        how = f"where model.start=DIR goes on from this run's `wn21k train export {self.path} DIR`."
                    raise RunError(
                        f"{self.path} holds a run with {section}.{field} = {before!r}, not {now!r}; name another "
                        f"output folder, {how}"
                    )
        known = self.data() if self.knows_its_data else data
        for key in ("classes", "images", "files"):
            if known.get(key, data.get(key)) != data.get(key):
                raise RunError(f"{self.path} holds a run on other data ({key} differ); name another output folder.")


def score(figures: Mapping[str, Any]) -> float:
    """The figure by which evaluations of a run are compared: semantic top-1, or top-1 if classes have no levels."""
    value = figures.get("semantic_top1", figures.get("top1"))
    return float(value) if isinstance(value, (int, float)) else -math.inf


def names_of(runs: Sequence[Path]) -> list[str]:
    """Names that tell the folders of runs apart: the last part of each path, or more of it."""
    paths = [expanded(run, RunError).absolute() for run in runs]
    if len({path.name for path in paths}) == len(set(paths)):
        return [path.name for path in paths]
    if len({path.anchor for path in paths}) > 1:  # Windows drives
        return [str(path) for path in paths]
    return [os.path.relpath(path, os.path.commonpath(paths)) for path in paths]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without what a killed process left half-written, nor numbers that are none."""
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            value = parse_json(line)
            if not isinstance(value, dict) or not isinstance(value.get("kind"), str):
                continue
            if isinstance(step := value.get("step"), int) and -(2**63) <= step < 2**63:
                lines.append({name: None if _is_no_figure(figure) else figure for name, figure in value.items()})
    return lines


def _is_no_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not -1e30 < value < 1e30


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint on the CPU; no pickled code runs.

    Raises:
        RunError: It is missing or damaged.
    """
    import torch  # late, as `wn21k train compare` needs none

    try:
        is_whole = _is_whole(path)
    except OSError as error:
        raise RunError(f"{path} cannot be read: {first_line(error)}.") from None
    if not is_whole:
        raise RunError(f"{path} cannot be read: damaged, or not a checkpoint.")
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        written = content["format"]
    except Exception as error:  # torch says much, with advice not to be followed
        raise RunError(f"{path} cannot be read: damaged, or not a checkpoint ({type(error).__name__}).") from None
    if written != FORMAT:
        raise RunError(f"{path} cannot be read: its format is {written}, this version reads {FORMAT}.")
    return content


def _is_whole(path: Path) -> bool:
    """Whether the checksums in a checkpoint are right, which torch does not compare.

    Raises:
        OSError: It cannot be read.
    """
    try:
        refuse_compressed(path)
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except Exception as error:  # zipfile and zlib raise many kinds of errors
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # of a place that damage names
            raise
        return False
