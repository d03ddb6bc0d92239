"""``wn21k predict``: photographs in, labels out."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wn21k_zoo.cli.output import (
    TREES,
    DeviceOption,
    Format,
    FormatOption,
    HeadOption,
    LabelSpaceOption,
    ResultWriter,
    choose_format,
    complete_record,
    warnings_as_messages,
)
from wn21k_zoo.errors import ImageNotFoundError, InvalidArgumentError, Wn21kError
from wn21k_zoo.messages import bar_column, bars, forget_unheard, on_terminal, say

if TYPE_CHECKING:
    from wn21k_zoo.predictor import Predictor

__all__ = ["predict"]

_PNG = "\udc89PNG"  # how one begins, as text
_LOOK = 8  # lines of stdin in which binary data is told from paths


def predict(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Images, folders (searched recursively, except hidden files), quoted globs, "
            "sample:cat|coffee|rocket, or - for paths on stdin, one per line.",
            metavar="PATH|DIR|GLOB|-",
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="A record (wn21k list), a timm name, a folder with config.json, or hf-hub:ORG/NAME. "
            "Default: $WN21K_MODEL, else the 21K default, else the embedded model.",
            autocompletion=complete_record,
        ),
    ] = None,
    top_k: Annotated[int, typer.Option("--top-k", "-k", min=1, help="Labels per level, and outputs.")] = 5,
    level: Annotated[
        int | None,
        typer.Option("--level", min=0, help="Of the levels, show this depth only; label, path and outputs stay."),
    ] = None,
    threshold: Annotated[
        float, typer.Option("--threshold", "-t", min=0.0, max=1.0, help="Confidence that the label must reach.")
    ] = 0.5,
    tree: Annotated[
        str | None,
        typer.Option("--tree", help=f"{TREES} Not for a semantic softmax."),
    ] = None,
    label_space: LabelSpaceOption = None,
    head: HeadOption = None,
    format: FormatOption = None,  # noqa: A002
    device: DeviceOption = "auto",
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=1, help="Images per forward pass. Default: 8 on a CPU, else 32.")
    ] = None,
    allow_url: Annotated[bool, typer.Option("--allow-url", help="Fetch images from public http(s) addresses.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages or progress bar, only errors.")] = False,
) -> None:
    """Predict labels at every level of the hierarchy.

    Exit codes: 0 all done, 1 failed, 2 usage, 3 some images failed and the rest are done, 130 interrupted.
    """
    if paths.count("-") > 1 or ("-" in paths and len(paths) > 1):
        raise InvalidArgumentError("- reads the paths from stdin; do not name other paths with it.")
    chosen = choose_format(format)
    _allow_any_name()
    if quiet:
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

        disable_progress_bars()
    from_stdin = paths == ["-"]
    sources: Iterable[str] = _lines_of_stdin() if from_stdin else list(_expand(paths))
    if not from_stdin and not any(_may_exist(source) for source in sources):
        # Nothing to predict: say so before a model is loaded.
        results = ((source, _why_not(source)) for source in sources)
        raise typer.Exit(_write(results, chosen, None, len(list(sources)), quiet=quiet))
    with warnings_as_messages(quiet):
        if on_terminal() and not quiet:
            say("loading the model")  # a line, not a spinner: a download draws its own progress bar below it
        from wn21k_zoo.predictor import Predictor

        predictor = Predictor(
            model,
            top_k=top_k,
            threshold=threshold,
            device=device,
            batch_size=batch_size,
            tree=tree,
            label_space=label_space,
            head=head,
            allow_url=allow_url,
        )
        # Classes that are not synsets are all roots.
        levels = [*predictor.tree.levels] if predictor.tree is not None else [0]
        if level is not None and level not in levels:
            known = ", ".join(map(str, levels)) or "none"
            name = f"The tree {predictor.tree.name}" if predictor.tree is not None else predictor.name
            raise InvalidArgumentError(f"{name} has no level {level}; its levels are {known}.")
        total = None if from_stdin else len(list(sources))
        predictions = _results(predictor, sources, read_ahead=not from_stdin)
        try:
            code = _write(predictions, chosen, level, total, quiet=quiet)
        except KeyboardInterrupt:
            say("interrupted")
            forget_unheard()
            os._exit(130)  # Python itself would wait for the image that is being read, which may be a pipe
        raise typer.Exit(code)


def _results(predictor: Predictor, sources: Iterable[str], *, read_ahead: bool) -> Iterator[tuple[str, Any]]:
    pending: list[str] = []

    def remembered() -> Iterator[str]:
        for source in sources:
            pending.append(source)
            yield source

    for result in predictor.stream(remembered(), read_ahead=read_ahead):
        yield pending.pop(0), result


def _write(
    results: Iterator[tuple[str, Any]], chosen: Format, level: int | None, total: int | None, *, quiet: bool
) -> int:
    """Write all results and return the exit code."""
    done = failed = 0
    with _progress(total, quiet or (chosen == "table" and sys.stdout.isatty())) as advance:
        writer = ResultWriter(chosen)
        try:
            for source, result in results:
                if isinstance(result, Wn21kError):
                    failed += 1
                    say(str(result))
                else:
                    done += 1
                    if level is not None:
                        result = replace(result, levels=(result.level(level),))
                writer.write(source, result)
                advance()
        finally:
            writer.close()
    if failed and total != 1:
        say(f"{failed} of {done + failed} images failed")
    if not done + failed:
        say("stdin named no image")
        return 1
    return 0 if not failed else 3 if done else 1


@contextmanager
def _progress(total: int | None, hidden: bool) -> Iterator[Callable[[], None]]:
    if hidden or total == 1 or not on_terminal():
        yield lambda: None
        return
    from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("predict"), bar_column(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("left"))
    with bars(*columns, transient=True) as progress:
        task = progress.add_task("predict", total=total)
        yield lambda: progress.advance(task)


def _lines_of_stdin() -> Iterator[str]:
    for number, line in enumerate(sys.stdin):
        if number < _LOOK and ("\0" in line or line.startswith(_PNG)):
            raise InvalidArgumentError(
                "stdin holds an image, or paths that are not one per line in UTF-8; to predict an image, name its file"
                + ("." if os.name == "nt" else ", or /dev/stdin.")
            )
        path = line.removeprefix("\ufeff" if not number else "").rstrip("\r\n")  # PowerShell writes that mark first
        if path.strip():
            yield path


def _expand(paths: list[str]) -> Iterator[str]:
    for path in paths:
        if path.startswith("sample:") or _is_url(path) or os.path.isfile(path):  # noqa: PTH113 - any name
            yield path
        elif os.path.isdir(path):  # noqa: PTH112
            # An empty folder, like a pattern without a match, is an item that fails.
            yield from sorted(_images_below(path)) or [path]
        elif glob.has_magic(path):
            matches = glob.glob(path, recursive=True)  # noqa: PTH207
            if "**" in path:
                matches = _each_folder_once(matches)
            yield from sorted(filter(os.path.isfile, matches)) or [path]
        else:
            yield path


def _each_folder_once(paths: list[str]) -> list[str]:
    """Of paths in one folder, which links can reach in many ways, keep those that go the shortest way."""
    ways: dict[str, str] = {}  # from real folders
    for folder in sorted({os.path.dirname(path) for path in paths}, key=lambda way: (len(Path(way).parts), way)):  # noqa: PTH120
        ways.setdefault(os.path.realpath(folder), folder)
    shortest = set(ways.values())
    return [path for path in paths if os.path.dirname(path) in shortest]  # noqa: PTH120


def _images_below(root: str) -> Iterator[str]:
    """Images that are not hidden, as in training; links to folders are followed, each folder once."""
    from wn21k_zoo.files import is_hidden
    from wn21k_zoo.images import IMAGE_SUFFIXES

    seen = {Path(os.path.realpath(root))}

    def is_new(folder: str) -> bool:
        if not os.path.islink(folder):  # noqa: PTH114
            return True
        place = Path(os.path.realpath(folder))
        if any(place.is_relative_to(other) or other.is_relative_to(place) for other in seen):
            return False
        seen.add(place)
        return True

    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = [name for name in below if not is_hidden(name) and is_new(os.path.join(folder, name))]  # noqa: PTH118
        for name in names:
            if not name.lower().endswith(IMAGE_SUFFIXES) or is_hidden(name):
                continue
            path = os.path.join(folder, name)  # noqa: PTH118 - keeps the path as the user wrote it
            if os.path.isfile(path) or not os.path.exists(path):  # noqa: PTH110, PTH113 - dead links, but no pipes
                yield path


def _is_url(path: str) -> bool:
    return path.lower().startswith(("http://", "https://"))


def _may_exist(source: str) -> bool:
    is_file = os.path.exists(source) and not os.path.isdir(source)  # noqa: PTH110, PTH112
    return source.startswith("sample:") or _is_url(source) or is_file


def _why_not(source: str) -> Wn21kError:
    """The error for something that is certainly not an image."""
    from wn21k_zoo.images import IMAGE_SUFFIXES, load_image

    if glob.has_magic(source):
        return ImageNotFoundError(f"No file matches {source}.")
    if os.path.isdir(source):  # noqa: PTH112
        return ImageNotFoundError(f"The folder {source} holds no images ({' '.join(IMAGE_SUFFIXES)}).")
    try:
        load_image(source)
    except Wn21kError as error:
        return error
    return ImageNotFoundError(f"There was no file {source} a moment ago; try again.")


def _allow_any_name() -> None:
    """Let file names that are not valid text pass: as they are on stdin, escaped on stdout as in all commands."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding=sys.getfilesystemencoding(), errors="surrogateescape")
