"""The typer application: global options, and errors as one line and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from wn21k_zoo import __version__
from wn21k_zoo.cli import cache, cards, convert, data, predict, publish, train, tree, zoo
from wn21k_zoo.cli.output import log_as_messages
from wn21k_zoo.errors import message_of
from wn21k_zoo.messages import say

__all__ = ["app"]


class _Group(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()  # else nobody would hear of a full disk
            return result
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(130) from None
        except Exception as error:
            if _is_closed_pipe(error):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(0) from None
            is_control_flow = type(error).__module__.startswith(("typer", "click"))
            if is_control_flow or ctx.params.get("debug"):
                raise
            unexpected = f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)"
            say(message_of(error) or unexpected)
            raise typer.Exit(getattr(error, "exit_code", 1)) from None


def _is_closed_pipe(error: Exception) -> bool:
    """Whether the reader of stdout has gone (wn21k ... | head); on Windows that may look like an invalid argument."""
    if isinstance(error, BrokenPipeError):
        return True
    if os.name != "nt" or not isinstance(error, OSError) or error.errno != errno.EINVAL:
        return False
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


app = typer.Typer(
    name="wn21k",
    cls=_Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="ImageNet-21K pretrained models with labels at every level of the WordNet hierarchy.",
)
app.command()(predict.predict)
app.command("list")(zoo.list_checkpoints)
app.command()(zoo.info)
app.command()(zoo.schema)
app.command()(zoo.doctor)
app.command()(cache.download)
app.command()(cache.verify)
app.command()(cache.lock)
app.command()(convert.convert)
app.command()(publish.export)
app.command()(publish.publish)
app.command()(train.evaluate)
app.add_typer(cache.app, name="cache")
app.add_typer(tree.app, name="tree")
app.add_typer(cards.app, name="cards")
app.add_typer(data.app, name="data")
app.add_typer(train.app, name="train")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"wn21k-zoo {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Open no connection for weights or images.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """ImageNet-21K pretrained models with labels at every level of the WordNet hierarchy."""
    log_as_messages()
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # for the libraries that this command uses, too
