"""``wn21k convert``: a published weight file to safetensors in timm's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wn21k_zoo.cli.output import to_write
from wn21k_zoo.errors import InvalidArgumentError
from wn21k_zoo.messages import say

__all__ = ["convert"]


def convert(
    file: Annotated[Path, typer.Argument(help="A .pth, .bin or .safetensors file of the authors or timm.")],
    output: Annotated[Path, typer.Option("--output", "-o", callback=to_write, help="The safetensors file to write.")],
    architecture: Annotated[
        str | None, typer.Option("--architecture", "-a", help="Its architecture. Default: recognised by its entries.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Convert a published weight file to safetensors in timm's layout; nothing in a pickle is executed."""
    from wn21k_zoo.convert import convert_file, save_safetensors

    if output.suffix != ".safetensors":
        raise InvalidArgumentError(f"{output} must end in .safetensors.")
    if output.exists() and not force:
        raise InvalidArgumentError(f"{output} exists; choose another name, or replace it with --force.")
    converted = convert_file(file, architecture)
    save_safetensors(converted, output)
    entries = f"{converted.num_classes:,} outputs, {len(converted.state_dict)} entries"
    say(f"{converted.architecture} with {entries}: {output}")
