"""``wn21k data``: turn the archives of ImageNet-21K into shards, and inspect them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from wn21k_zoo.cli.output import (
    Format,
    FormatOption,
    at_home,
    choose_format,
    print_table,
    printed_as_json,
    progress_bar,
    to_write,
)
from wn21k_zoo.messages import say

if TYPE_CHECKING:
    from wn21k_zoo.training.options import PrepareOptions

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, help="Training data: prepare shards, look at them, verify them.")

WorkersOption = Annotated[int | None, typer.Option("--workers", "-j", min=1, help="Processes. Default: all cores.")]
FolderArgument = Annotated[
    Path, typer.Argument(metavar="DIR", callback=at_home, help="An output folder of wn21k data prepare.")
]


@app.command()
def prepare(
    source: Annotated[
        Path,
        typer.Argument(
            callback=at_home,
            help="fall11_whole.tar, winter21_whole.tar.gz, a folder of class archives or class folders (also in train/ "
            "and val/), the processed ImageNet-21K-P of image-net.org (split and resized as it comes; "
            "imagenet21k_small_classes is left out).",
        ),
    ],
    output: Annotated[
        Path,
        typer.Argument(metavar="OUT", callback=to_write, help="Folder for the shards; on a cluster a shared one."),
    ],
    label_space: Annotated[
        str, typer.Option("--label-space", help="Classes, and their indices: a name, or a text file of wnids.")
    ] = "fall11",
    min_images: Annotated[int, typer.Option("--min-images", help="A class needs more images than this.")] = 500,
    val_per_class: Annotated[
        int, typer.Option("--val-per-class", help="The first N names of a class are used for validation.")
    ] = 50,
    size: Annotated[int, typer.Option("--size", help="In pixels.")] = 224,
    resize: Annotated[
        Literal["squash", "short-edge", "none"],
        typer.Option(
            "--resize", help="To a square, the shorter edge to the size, or not at all. Smaller images keep their size."
        ),
    ] = "squash",
    quality: Annotated[int, typer.Option("--quality", help="Of JPEG, 1 to 100.")] = 95,
    shard_size: Annotated[int, typer.Option("--shard-size", help="Images per shard.")] = 10_000,
    workers: WorkersOption = None,
    engine: Annotated[
        Literal["local", "ray"], typer.Option("--engine", help="Processes here, or Ray tasks.")
    ] = "local",
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="Of a Ray cluster. Default: RAY_ADDRESS, else one on this machine."),
    ] = None,
    max_bad: Annotated[float, typer.Option("--max-bad", min=0, max=1, help="Allowed share of unusable images.")] = 0.01,
    allow_truncated: Annotated[
        bool,
        typer.Option(
            "--allow-truncated",
            help="Use what is there of an archive that ends too early or has a wrong checksum, and leave out damaged "
            "class archives.",
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue an unfinished run with the same options.")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only count images and show the space needed, in --format.")
    ] = False,
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Make WebDataset shards with a manifest; after an interruption or kill, the same command resumes."""
    from wn21k_zoo.errors import InvalidArgumentError
    from wn21k_zoo.training.options import PrepareOptions

    options = PrepareOptions(
        label_space=label_space,
        min_images=min_images,
        val_per_class=val_per_class,
        size=size,
        resize=resize,
        quality=quality,
        shard_size=shard_size,
    )
    run: dict[str, Any] = {"workers": workers, "engine": engine, "ray_address": ray_address}
    if ray_address is not None and engine != "ray":
        raise InvalidArgumentError("--ray-address is for a Ray cluster; add --engine ray.")
    if dry_run:
        _count(source, output, options, {**run, "allow_truncated": allow_truncated}, format)
        return
    if format is not None:
        raise InvalidArgumentError("--format is for --dry-run; `wn21k data info` describes the output in any format.")
    from wn21k_zoo.training.prepare import prepare as prepare_shards

    with progress_bar() as progress:
        made = prepare_shards(
            source,
            output,
            options,
            **run,
            max_bad=max_bad,
            allow_truncated=allow_truncated,
            resume=resume,
            progress=progress,
        )
    typer.echo((output / "SUMMARY.md").read_text(encoding="utf-8", errors="replace"), nl=False)
    for split, change in (("train", "lower"), ("validation", "raise")):
        if split not in made.splits:
            ours = "val_per_class" in made.preparation  # else the source was already split
            say(f"there are no images for {split}" + (f": {change} --val-per-class, in another folder" if ours else ""))
    say(f"complete: {output}")


@app.command()
def info(
    folder: FolderArgument,
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Show classes, images, sizes, imbalance, and counts per depth of the hierarchy."""
    from wn21k_zoo.training.inspect import describe

    described = describe(folder)
    if printed_as_json(described, format):
        return
    rows = [{"split": split, **values} for split, values in described["splits"].items()]
    print_table(rows, tuple(rows[0]), format)
    if choose_format(format) == "csv":  # one table per file
        return
    print_table(described["depths"], ("depth", "classes", "with_images", "images"), format)
    say(f"label space {described['label_space']}; {described['preparation']}")


@app.command()
def show(
    folder: FolderArgument,
    synset: Annotated[str | None, typer.Option("--synset", help="A wnid. Default: images of all classes.")] = None,
    split: Annotated[str, typer.Option("--split", help="train or validation.")] = "train",
    count: Annotated[int, typer.Option("--count", "-n", min=1, max=1000, help="Images.")] = 48,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", callback=to_write, help="PNG file. Default: SYNSET.png or SPLIT.png here."),
    ] = None,
) -> None:
    """Write a contact sheet as PNG."""
    from wn21k_zoo.errors import DataOutputError
    from wn21k_zoo.files import write_whole
    from wn21k_zoo.training.inspect import contact_sheet

    sheet = contact_sheet(folder, synset, split, count)
    place = output or Path(f"{synset or split}.png")
    picture = io.BytesIO()
    sheet.save(picture, "PNG")
    write_whole(place, picture.getvalue(), DataOutputError)
    typer.echo(str(place))


@app.command()
def verify(
    folder: FolderArgument,
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Hash all shards, compare counts, and check that labels are in range. Exit code 1 if something is damaged."""
    from wn21k_zoo.training.inspect import verify_shards
    from wn21k_zoo.training.options import Progress

    with progress_bar() as progress:
        damages = verify_shards(
            folder, lambda done, total: progress(Progress(stage="verify", done=done, total=total, images=0))
        )
    if damages or choose_format(format) != "table":
        rows = [{"file": damage.file, "key": damage.key, "problem": damage.problem} for damage in damages]
        print_table(rows, ("file", "key", "problem"), format)
    if damages:
        raise typer.Exit(1)
    say(f"everything is as it was written: {folder}")


def _count(source: Path, output: Path, options: PrepareOptions, run: dict[str, Any], format: Format | None) -> None:  # noqa: A002
    from wn21k_zoo.training.dry_run import count

    with progress_bar() as progress:
        counts = count(source, options, **run, progress=progress)
    rows: list[dict[str, Any]] = []
    for decision in sorted({one.decision for one in counts}):
        mine = [one for one in counts if one.decision == decision]
        rows.append(
            {
                "decision": decision,
                "classes": len({one.wnid for one in mine}),
                "train": sum(one.train for one in mine),
                "validation": sum(one.validation for one in mine),
                "GB": round(sum(one.stored_bytes for one in mine) / 1e9, 3),
            }
        )
    print_table(rows, ("decision", "classes", "train", "validation", "GB"), format)
    trained = {one.wnid for one in counts if one.train}
    if untrained := {one.wnid for one in counts if one.validation} - trained:
        say(f"{len(untrained):,} classes would have validation images alone (see --val-per-class)")
    needed = sum(one.stored_bytes for one in counts) / 1e9
    say(f"about {needed:,.2f} GB for the output, and as much again while it is being made")
    for place in (output.absolute(), *output.absolute().parents):
        if place.exists():
            say(f"{shutil.disk_usage(place).free / 1e9:,.1f} GB are free at {place}")
            break
