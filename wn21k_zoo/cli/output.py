"""Output of the commands: messages on stderr; results on stdout as table, json, jsonl or csv."""

from __future__ import annotations

import csv
import json
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wn21k_zoo.checkpoints import CHECKPOINTS, Head
from wn21k_zoo.errors import InvalidArgumentError, Wn21kError
from wn21k_zoo.files import expanded, local_path
from wn21k_zoo.messages import bar_column, bars, printable, say

if TYPE_CHECKING:
    from rich.console import Console

    from wn21k_zoo.prediction import Label, Prediction
    from wn21k_zoo.training.options import Progress

__all__ = [
    "CSV_COLUMNS",
    "TREES",
    "DeviceOption",
    "Format",
    "FormatOption",
    "HeadOption",
    "LabelSpaceOption",
    "ResultWriter",
    "at_home",
    "choose_format",
    "complete_record",
    "console",
    "log_as_messages",
    "print_json",
    "print_table",
    "printed_as_json",
    "progress_bar",
    "to_write",
    "warnings_as_messages",
]

CSV_COLUMNS: Mapping[str, str] = {
    "source": "path, URL or name of the image",
    "kind": "label (the deepest that reaches the threshold), level, output (the model's own classes) or error",
    "depth": "depth in the tree; empty for output and error",
    "rank": "1 is the best of its level or of the outputs",
    "index": "index in the tree; for output in the label space",
    "wnid": "WordNet 3.0 noun id; empty if the class is not a synset",
    "name": "lemmas, or the class's own name; for error its message",
    "probability": "0 to 1",
    "confidence": "0 to 1; empty for output and error",
    "model": "model that predicted; empty for error",
    "label_space": "classes of its head",
    "tree": "tree of depth and index",
}


_CONTROLS_OF_JSON = {code: f"\\u{code:04x}" for code in range(0x7F, 0xA0)}  # those below 32 are escaped anyway


Format = Literal["table", "json", "jsonl", "csv"]
FormatOption = Annotated[
    Format | None, typer.Option("--format", "-f", help="Default: table on a terminal, jsonl in a pipe.")
]
LabelSpaceOption = Annotated[
    str | None,
    typer.Option(
        "--label-space",
        help="Classes of a folder's model, in place of those it states: a name, a file of wnids, or own (names alone).",
    ),
]
TREES = "fall11, winter21, another label space, a text file of wnids, or the authors' tree.pth."
HeadOption = Annotated[
    Head | None, typer.Option("--head", help="How to read the outputs of a folder's model, in place of what it states.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]


def complete_record(incomplete: str) -> list[str]:
    """The names of records that begin so, for the shell's completion."""
    return [checkpoint.name for checkpoint in CHECKPOINTS if checkpoint.name.startswith(incomplete)]


class _Messages(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say(self.format(record))


def log_as_messages() -> None:
    """From now on, print the package's log warnings as one line on stderr, like any other message."""
    logger = logging.getLogger("wn21k_zoo")
    if not any(isinstance(handler, _Messages) for handler in logger.handlers):
        logger.addHandler(_Messages(logging.WARNING))


def choose_format(chosen: Format | None) -> Format:
    """The chosen format; by default a table on a terminal, jsonl in a pipe."""
    return chosen or ("table" if sys.stdout.isatty() else "jsonl")


def console() -> Console:
    """A rich console, 120 columns wide in a pipe or a file."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@contextmanager
def warnings_as_messages(quiet: bool) -> Iterator[None]:
    """Within, a Python warning is printed as one line on stderr, or not at all."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if not quiet:
            say(" ".join(str(message).split()))

    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.filterwarnings("ignore", module="PIL")  # names no file
        warnings.showwarning = show
        yield


def print_json(value: Any, indent: int | None = 2) -> None:
    """Write JSON to stdout."""
    sys.stdout.write(_json(value, indent) + "\n")


def _json(value: Any, indent: int | None = None) -> str:
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    return text.translate(_CONTROLS_OF_JSON)


def printed_as_json(value: Any, chosen: Format | None) -> bool:
    """Write one value to stdout if the format is JSON, on one line for jsonl; return whether it is."""
    chosen = choose_format(chosen)
    if chosen not in ("json", "jsonl"):
        return False
    print_json(value, indent=2 if chosen == "json" else None)
    return True


def print_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], chosen: Format | None, heads: Sequence[str] | None = None
) -> None:
    """Write rows of plain values to stdout in a format; a table shows None as 'unknown'.

    Args:
        rows: Each with a value per column.
        columns: Keys of the rows, in order.
        chosen: The format.
        heads: Of a table; by default the columns with spaces for underscores.
    """
    chosen = choose_format(chosen)
    if chosen == "json":
        print_json(list(rows))
    elif chosen == "jsonl":
        for row in rows:
            print_json(row, indent=None)
    elif chosen == "csv":
        writer = csv.DictWriter(sys.stdout, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(map(_cells, rows))
    else:
        from rich import box
        from rich.table import Column, Table
        from rich.text import Text

        # Nothing is cut off: a path or a URL continues on the next line.
        heads = heads or [column.replace("_", " ") for column in columns]
        table = Table(*(Column(Text(head), overflow="fold") for head in heads), box=box.SIMPLE_HEAD)
        for row in rows:
            table.add_row(*(Text("unknown" if row[column] is None else _lines(row[column])) for column in columns))
        console().print(table)


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """A bar per stage on stderr, with images/s and the time left."""
    from rich.progress import TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:>8}"), bar_column(), TaskProgressColumn(), TimeRemainingColumn(),
        TextColumn("left"), TextColumn("{task.fields[speed]}"),
    )  # fmt: skip
    shown = bars(*columns)
    tasks: dict[str, Any] = {}
    try:

        def show(progress: Progress) -> None:
            if progress.stage not in tasks:
                shown.start()  # only when there is something to show
                tasks[progress.stage] = shown.add_task(progress.stage, total=progress.total, speed="")
            task = tasks[progress.stage]
            elapsed = shown.tasks[task].elapsed or 0
            speed = f"{progress.images:,} images, {progress.images / elapsed:,.0f}/s" if elapsed > 0.1 else ""
            speed = speed if progress.images else ""
            shown.update(task, completed=progress.done, total=progress.total, speed=speed)

        yield show
    finally:
        if tasks:
            shown.stop()


def at_home(path: Path | None) -> Path | None:
    """For path parameters: expand a ~ that the shell left, as in --output=~/x."""
    return None if path is None else expanded(path, InvalidArgumentError)


def to_write(path: Path | None) -> Path | None:
    """The same for output parameters, which must not be URLs."""
    return None if path is None else local_path(path, InvalidArgumentError)


class ResultWriter:
    """Writes results one by one as they arrive, so a stream of any length works."""

    def __init__(self, chosen: Format) -> None:
        self.format = chosen
        self._count = 0
        if chosen == "csv":
            self._csv = csv.DictWriter(sys.stdout, [*CSV_COLUMNS], extrasaction="ignore", lineterminator="\n")
            self._csv.writeheader()
        if chosen == "json":
            sys.stdout.write("[")
        if chosen == "table":
            self._console = console()

    def write(self, source: str | None, result: Prediction | Wn21kError) -> None:
        """Write one result; errors are items of the machine-readable formats too."""
        from wn21k_zoo.prediction import error_to_dict

        if self.format == "table":
            if not isinstance(result, Wn21kError):
                _print_prediction(self._console, result)
        elif self.format == "csv":
            self._csv.writerows(map(_cells, _csv_rows(source, result)))
        else:
            value = error_to_dict(source, result) if isinstance(result, Wn21kError) else result.to_dict()
            if self.format == "json":
                sys.stdout.write(",\n" if self._count else "\n")
            sys.stdout.write(_json(value))
            if self.format == "jsonl":
                sys.stdout.write("\n")
        sys.stdout.flush()
        self._count += 1

    def close(self) -> None:
        """End the JSON array."""
        if self.format == "json":
            sys.stdout.write("\n]\n" if self._count else "]\n")


def _cells(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a CSV; on a terminal no control characters take effect."""
    if not sys.stdout.isatty():
        return row
    return {name: printable(value) if isinstance(value, str) else value for name, value in row.items()}


def _csv_rows(source: str | None, result: Prediction | Wn21kError) -> Iterator[dict[str, Any]]:
    if isinstance(result, Wn21kError):
        yield {"source": source, "kind": "error", "name": str(result)}
        return
    about = {"source": source, "model": result.model, "label_space": result.label_space, "tree": result.tree}
    labels = [("label", 1, result.label)] if result.label else []
    labels += [("level", rank, label) for level in result.levels for rank, label in enumerate(level.labels, 1)]
    outputs = [("output", rank, output) for rank, output in enumerate(result.top_k, 1)]
    for kind, rank, item in (*labels, *outputs):
        yield {**about, "kind": kind, "rank": rank, **vars(item)}


def _lines(value: Any) -> str:
    return "\n".join(map(printable, str(value).split("\n")))


def _plain(text: str) -> str:
    """Text for rich to show literally: neither markup nor control characters take effect."""
    from rich.markup import escape

    return escape(printable(text))


def _scored(label: Label) -> str:
    wnid = f" [dim]{_plain(label.wnid)}[/]" if label.wnid else ""
    return f"{_plain(label.name)}{wnid} {label.confidence:.2f}"


def _print_prediction(target: Console, prediction: Prediction) -> None:
    best = prediction.label
    title = _scored(best) if best else "no label reaches the threshold"
    target.print(f"[bold]{_plain(prediction.source or 'image')}[/]  [bold green]{title}[/]")
    if prediction.top_k[0].wnid:  # else there is nothing but the outputs
        _print_tree(target, prediction)
    top = " · ".join(f"{output.short_name} {output.probability:.2f}" for output in prediction.top_k)
    target.print(f"[dim]outputs[/] {_plain(top)}")
    tree = f", tree {prediction.tree}" if prediction.top_k[0].wnid else ""
    unmapped = f", {prediction.unmapped:.2f} unmapped" if prediction.unmapped >= 0.005 else ""
    about = f"model {prediction.model}, label space {prediction.label_space}{tree}{unmapped}"
    target.print(f"[dim]{_plain(about)}[/]\n")


def _print_tree(target: Console, prediction: Prediction) -> None:
    from rich import box
    from rich.table import Table
    from rich.tree import Tree

    branch = tree = Tree("path", hide_root=True)
    for label in prediction.path:
        style = "bold green" if label == prediction.label else "" if label.confidence >= prediction.threshold else "dim"
        branch = branch.add(_scored(label), style=style)
    target.print(tree)
    table = Table("level", "label", "wnid", "p", "next", box=box.SIMPLE_HEAD)
    for level in prediction.levels:
        if not level.labels:
            continue
        first, *others = level.labels
        following = " · ".join(
            f"{other.short_name} {other.probability:.2f}" for other in others if other.probability >= 0.005
        )
        table.add_row(
            str(level.depth), _plain(first.name), _plain(first.wnid), f"{first.probability:.2f}", _plain(following)
        )
    target.print(table)
