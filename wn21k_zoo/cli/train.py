"""``wn21k train`` and ``wn21k evaluate``: the cost of a recipe, the course of a run, and its results.

Runs themselves are started with ``python -m wn21k_zoo.training.train`` or torchrun.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wn21k_zoo.cli.output import (
    DeviceOption,
    Format,
    FormatOption,
    HeadOption,
    LabelSpaceOption,
    choose_format,
    print_table,
    printed_as_json,
    progress_bar,
    to_write,
)
from wn21k_zoo.messages import say

if TYPE_CHECKING:
    from wn21k_zoo.training.state import RunFolder

__all__ = ["app", "evaluate"]

app = typer.Typer(
    no_args_is_help=True,
    help="Training: cost of a recipe, course and results of runs. To start a run, see `python -m "
    "wn21k_zoo.training.train --help`; on several GPUs use torchrun.",
)

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="NAME or FILE.py[:FUNCTION[:TEXT]], or a run.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Change a field, as in schedule.epochs=40.")
]


@app.command("list")
def list_recipes(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="A recipe file, or a folder of them. Default: those of wn21k_zoo."),
    ] = None,
    format: FormatOption = None,  # noqa: A002
) -> None:
    """List all shipped recipes, or those of a file or folder."""
    from wn21k_zoo.errors import RecipeError
    from wn21k_zoo.files import visible
    from wn21k_zoo.training.recipe_files import listed_in, shipped_recipes

    if file is None:
        files = shipped_recipes()
    else:
        files = {str(path): path for path in (visible(file, "*.py") if file.is_dir() else [file])}
    if not all(path.is_file() and path.suffix == ".py" for path in files.values()) or not files:
        raise RecipeError(f"{file} is not a recipe file, nor a folder with one.")
    rows, failed = [], False
    for shown, path in files.items():
        try:
            found = listed_in(path)
        except RecipeError as error:
            say(str(error))
            failed = True
        else:
            rows += [{"recipe": f"{shown}:{name}", "about": about} for name, about in found.items()]
    print_table(rows, ("recipe", "about"), format)
    if failed:
        raise typer.Exit(3 if rows else 2)


@app.command()
def show(recipe: RecipeArgument, set: SetOption = None) -> None:  # noqa: A002
    """Show all fields of a recipe, as JSON."""
    from wn21k_zoo.training.recipe_files import load_recipe, override

    resolved = override(load_recipe(recipe), set or [])
    resolved.check()
    typer.echo(resolved.to_json(), nl=False)


@app.command()
def plan(
    recipe: RecipeArgument,
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="Number of GPUs.")] = 8,
    images_per_second: Annotated[
        float | None,
        typer.Option("--images-per-second", min=0.001, help="Of one GPU in training. Default: published for a V100."),
    ] = None,
    images: Annotated[
        int | None,
        typer.Option("--images", min=1, help="Training images. Default: of --data, of the run, or as published."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Training data, to count its images and classes.")] = None,
    set: SetOption = None,  # noqa: A002
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Show steps, images, hours, and an estimate of the memory and of the room on disk."""
    from wn21k_zoo.training.plan import plan as make_plan
    from wn21k_zoo.training.recipe import RANDOM
    from wn21k_zoo.training.recipe_files import load_recipe, override
    from wn21k_zoo.training.splits import open_splits

    resolved = override(load_recipe(recipe), set or [])
    classes, run = None, _run_of(recipe)
    if run and (begun := run.begun()) and begun.model.start and begun.model.start == resolved.model.start:
        resolved.model.start = f"{RANDOM}{begun.model.start}"  # it is needed no longer
    if data is not None:
        resolved.check()
        splits = open_splits(resolved, data)
        images, classes = images or len(splits.train), len(splits.class_names)
    elif run and run.recipe().data.label_space == resolved.data.label_space:
        images, classes = images or run.training_images(), len(run.classes()[1])
    figures = make_plan(resolved, gpus=gpus, images_per_second=images_per_second, images=images, classes=classes)
    row = {"recipe": resolved.name, "gpus": gpus, **dataclasses.asdict(figures)}
    if choose_format(format) == "table":
        print_table(
            [{"field": name, "value": _readable(value)} for name, value in row.items()], ("field", "value"), format
        )
    else:
        print_table([row], tuple(row), format)


def _run_of(recipe: str) -> RunFolder | None:
    """The folder of a run that was named as the recipe, if it says what it is trained on; else None."""
    from wn21k_zoo.files import RECIPE_FILE
    from wn21k_zoo.training.state import RunFolder

    place = Path(recipe)
    folder = RunFolder(place.parent if place.name == RECIPE_FILE else place)
    return folder if folder.knows_its_data else None


@app.command()
def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Output folders of runs, drawn in the same plots.")
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=to_write, help="PNG file. Default: plot.png in the first run."),
    ] = None,
) -> None:
    """Plot loss, learning rate, accuracies and speed as PNG (extra plot)."""
    from wn21k_zoo.training.plots import plot_runs
    from wn21k_zoo.training.state import RunFolder

    runs = _expanded(runs)
    typer.echo(str(plot_runs(runs, output or RunFolder(runs[0]).path / "plot.png")))


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", readable=False, help="Output folders of runs, or folders of them.")
    ],
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Compare the last evaluation of each run, and show the epoch of its best one, which export takes."""
    from wn21k_zoo.errors import RunError, message_of
    from wn21k_zoo.training.state import names_of

    rows, failed = [], False
    runs = [*dict.fromkeys(each for run in _expanded(runs) for each in _runs_in(run))]
    for run, name in zip(runs, names_of(runs), strict=True):
        try:
            if (row := _last_evaluation(run)) is not None:
                rows.append({"run": name, **row})
            else:
                say(f"{run} holds no run that was evaluated yet.")
        except (RunError, PermissionError) as error:  # others' runs may be their owners' alone
            failed = True
            say(str(message_of(error)))
    if not rows:
        raise RunError("There is nothing to compare.")
    _print_beside(rows, format)
    if failed:
        raise typer.Exit(3)


def _print_beside(rows: list[dict[str, Any]], format: Format | None) -> None:  # noqa: A002
    """Print rows; on a terminal each as a column."""
    if choose_format(format) != "table":
        print_table(rows, tuple(rows[0]), format)
        return
    for begin in range(0, len(rows), _BESIDE):
        few = rows[begin : begin + _BESIDE]
        columns = tuple(str(number) for number in range(len(few) + 1))
        values = [[field.replace("_", " "), *(row[field] for row in few)] for field in few[0]]
        first, *others = (dict(zip(columns, line, strict=True)) for line in values)
        print_table(others, columns, format, heads=tuple(first.values()))


def _last_evaluation(run: Path) -> dict[str, Any] | None:
    from wn21k_zoo.errors import RunError
    from wn21k_zoo.training.state import RunFolder, read_lines, score

    folder = RunFolder(run)
    lines = read_lines(folder.metrics) if folder.metrics.is_file() else []
    evaluations = [line for line in lines if line["kind"] == "evaluation"]
    if not folder.path.is_dir():
        raise RunError(f"{folder.path} is not a folder.")
    if not evaluations:
        return None
    last, recipe = evaluations[-1], folder.recipe()
    # A run that is resumed with another number of images forgets its best.
    comparable = [each for each in evaluations if each.get("images") == last.get("images")]
    named = recipe.data.label_space
    if folder.knows_its_data:
        named = folder.data().get("label_space")
    return {
        "loss": recipe.loss.kind,
        "epoch": last.get("epoch"),
        "best_epoch": max(comparable, key=score).get("epoch"),
        "classes": named if isinstance(named, str) else "own",
        "images": last.get("images"),
        "hierarchy": last.get("hierarchy"),
        **{name: round(last[name], 2) if isinstance(last.get(name), (int, float)) else None for name in _COMPARED},
    }


def _expanded(runs: list[Path]) -> list[Path]:
    """Expand patterns, which Windows shells leave to the program; what matches nothing stays as it is."""
    found = {run: [] if os.access(run, os.F_OK) else sorted(map(Path, glob.glob(str(run)))) for run in runs}  # noqa: PTH207
    return [each for run in runs for each in found[run] or [run]]


def _runs_in(folder: Path) -> list[Path]:
    """The folder itself, or, if it is not a run but contains some, those."""
    from wn21k_zoo.files import RECIPE_FILE, is_run

    if not os.access(folder, os.R_OK | os.X_OK) or is_run(folder) or not folder.is_dir():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"*/{RECIPE_FILE}")) or [folder]


_BESIDE = 6  # runs side by side, a column each, on a terminal


_COMPARED = (
    "semantic_top1",
    "raw_semantic_top1",
    "top1",
    "top5",
    "top1_among_all",
    "balanced_top1",
    "raw_top1",
    "mean_lca_error",
    "mean_lca_error_of_mistakes",
    "hierarchical_precision",
    "hierarchical_recall",
    "calibration_error",
)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Output folder of a run.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the model.")],
    which: Annotated[Literal["best", "last"], typer.Option("--checkpoint", help="best or last.")] = "best",
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the record. Default: the recipe's, unless published.")
    ] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, float16 or bfloat16.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the folder of an earlier export.")] = False,
) -> None:
    """Export a run as a folder that timm, transformers and wn21k_zoo load, with a draft of its record."""
    from wn21k_zoo.training.export import export_run

    typer.echo(str(export_run(run, folder, which=which, name=name, dtype=dtype, force=force)))


def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A run, a record's or timm's name, a folder, hf-hub:ORG/NAME.")
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA", help="Shards, a URL of them, or class folders named by wnids or as the model's own classes."
        ),
    ],
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            help="validation, train, test, or, for class folders, all (validation and train). Default: validation; "
            "but all images of a folder that has no splits, unless MODEL was trained on it.",
        ),
    ] = None,
    which: Annotated[Literal["best", "last"], typer.Option("--checkpoint", help="Of a run, best or last.")] = "best",
    label_space: LabelSpaceOption = None,
    head: HeadOption = None,
    image_size: Annotated[
        int | None,
        typer.Option("--image-size", min=1, help="Width and height in pixels. Default: the model's."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images at a time.")] = 64,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-j", min=0, help="Processes that load images. Default: all cores, at most 16."),
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option("--precision", help="Of the forward pass.")
    ] = "fp32",
    with_ancestors: Annotated[
        bool,
        typer.Option(
            "--with-ancestors",
            help="Count hierarchical errors with all synsets above the classes, to compare models over different ones.",
        ),
    ] = False,
    max_bad: Annotated[
        float,
        typer.Option(
            "--max-bad", min=0, max=1, help="Allowed share of damaged images; ten are always allowed for 0.01."
        ),
    ] = 0.01,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=to_write, help="JSON file for all figures, also those of each class."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", callback=to_write, help="PNG file for a reliability diagram (extra plot).")
    ] = None,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--predictions",
            help="CSV file with a row per image: class, prediction (of the leaves with images), confidence.",
        ),
    ] = None,
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Measure semantic and leaf accuracy, hierarchical errors, calibration and throughput of a model on a split."""
    from wn21k_zoo.errors import DataOutputError
    from wn21k_zoo.files import check_writable, write_whole
    from wn21k_zoo.training.evaluate import evaluate as run_evaluation
    from wn21k_zoo.training.options import Progress
    from wn21k_zoo.training.plots import check_picture, plot_reliability

    if output is not None:
        check_writable(output)
    if plot is not None:
        check_picture(plot)
    with progress_bar() as progress:
        figures = run_evaluation(
            model,
            data,
            split=split,
            which=which,
            label_space=label_space,
            head=head,
            image_size=image_size,
            batch_size=batch_size,
            workers=workers,
            device=device,
            precision=precision,
            with_ancestors=with_ancestors,
            max_bad=max_bad,
            predictions=predictions,
            progress=lambda done, total: progress(Progress(stage="evaluate", done=done, total=total, images=0)),
        )
    if figures["left_out"]:
        say(f"{figures['left_out']:,} images of classes that the model does not know are left out")
    if figures["classes_with_images"] < figures["classes"]:
        say(
            f"{figures['classes_with_images']:,} of {figures['classes']:,} classes have images: top1, top5 and "
            "raw_top1 are among these"
        )
    if above := figures["images"] - figures["leaf_images"]:
        say(f"{above:,} images are of classes above others, and count in no figure of leaves, such as top1 and top5")
    _print_figures({name: value for name, value in figures.items() if name != "per_class"}, format)
    if output is not None:
        write_whole(output, json.dumps(figures, indent=1) + "\n", DataOutputError)
    if plot is not None:
        plot_reliability(figures, plot)
        say(f"reliability diagram: {plot}")


def _print_figures(figures: dict[str, Any], format: Format | None) -> None:  # noqa: A002
    if printed_as_json(figures, format):
        return
    shown = {**figures, "input_size": " x ".join(map(str, figures["input_size"]))}
    shown = {name: value for name, value in shown.items() if not isinstance(value, (dict, list))}
    shown |= {f"level {depth}": value for depth, value in figures.get("levels", {}).items()}
    if choose_format(format) == "table":
        shown = {name.replace("_", " "): _readable(value) for name, value in shown.items()}
    print_table([{"figure": name, "value": value} for name, value in shown.items()], ("figure", "value"), format)


def _readable(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:,.2f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
