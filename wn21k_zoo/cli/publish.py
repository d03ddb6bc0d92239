"""``wn21k export`` and ``wn21k publish``: write a repository folder, and upload it to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wn21k_zoo.cli.output import FormatOption, complete_record, print_table
from wn21k_zoo.messages import say

__all__ = ["export", "publish"]


def export(
    model: Annotated[
        str,
        typer.Argument(help="A record, a timm model or a published weight file.", autocompletion=complete_record),
    ],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    record: Annotated[str | None, typer.Option("--record", help="The record of a weight file, if several fit.")] = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16. Default: that of the weights.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that an earlier export wrote.")] = False,
) -> None:
    """Write a folder that timm, transformers and wn21k_zoo load: weights, configuration, labels, tree, model card."""
    from wn21k_zoo.files import visible
    from wn21k_zoo.publish import export_folder

    for path in visible(export_folder(model, folder, record=record, dtype=dtype, force=force), "*"):
        say(f"{path} {path.stat().st_size / 1e6:,.1f} MB")


def publish(
    folder: Annotated[Path, typer.Argument(help="A folder written by wn21k export, wn21k train export or save_model.")],
    repo: Annotated[str, typer.Option("--repo", help="ORG/NAME on the Hugging Face Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Branch. Default: main.")] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Commit message.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list the files; open no connection.")] = False,
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Upload an exported folder to the Hugging Face Hub."""
    from wn21k_zoo.publish import check_repo_id, plan_upload, publish_folder

    check_repo_id(repo)
    if dry_run:
        planned = plan_upload(folder)
        rows = [{"file": path.name, "bytes": num_bytes} for path, num_bytes in planned.items()]
        print_table(rows, ("file", "bytes"), format)
        total = sum(planned.values()) / 1e6
        say(f"{total:,.1f} MB would go to {repo}, branch {revision or 'main'}{', private' if private else ''}")
        return
    typer.echo(publish_folder(folder, repo, private=private, revision=revision, commit_message=message))
