"""``wn21k cards``: print a model card, write all of them and the README's table, check that they are up to date."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from wn21k_zoo import registry
from wn21k_zoo.cli.output import complete_record, to_write
from wn21k_zoo.errors import InvalidArgumentError, RecordError
from wn21k_zoo.files import make_folder, write_whole
from wn21k_zoo.messages import say

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Print a model card, write all of them, check that they are up to date.")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A record; wn21k list shows all.", autocompletion=complete_record)],
) -> None:
    """Print the model card of a checkpoint; its hand-written part is available only in a checkout."""
    checkpoint = registry.get_checkpoint(name)
    from wn21k_zoo import cards

    checkout = cards.find_checkout()
    prose = cards.known_prose(name, checkout / cards.FOLDER) if checkout else ""
    sys.stdout.write(cards.render_card(checkpoint, prose))


@app.command()
def build(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            callback=to_write,
            help="Write the cards to this folder and leave the README alone. Default: model_cards of the checkout.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit code 1 if a file is out of date.")
    ] = False,
) -> None:
    """Write all model cards and the README's table from the records; hand-written parts of the cards are kept."""
    if output is not None and output.exists() and not output.is_dir():
        raise InvalidArgumentError(f"{output} is a file; --output needs a folder.")
    from wn21k_zoo import cards

    files = cards.planned_files(cards.find_checkout(), output)
    stale = cards.stale_cards(next(iter(files)).parent, files)
    different = [path for path, text in files.items() if not _holds(path, text)]
    if not check:
        for path in different:
            make_folder(path.parent, RecordError, "name another place with --output.")
            write_whole(path, files[path], RecordError)
        say(f"{len(different)} of {len(files)} files written, the others are up to date")
    for path in different if check else ():
        say(f"{_shown(path)} is out of date")
    for path in stale:
        say(f"{_shown(path)} belongs to no record; delete it, or rename it to keep what was written by hand")
    if check and (different or stale):
        say("run wn21k cards build to write them")
        raise typer.Exit(1)
    if check:
        say(f"{len(files)} files, all up to date")


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes().replace(b"\r\n", b"\n") == text.encode()


def _shown(path: Path) -> str:
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
