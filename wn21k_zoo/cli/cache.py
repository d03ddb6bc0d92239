"""``wn21k download``, ``verify``, ``cache`` and ``lock``: weights on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from wn21k_zoo import registry
from wn21k_zoo.checkpoints import CHECKPOINTS, LOCK_FILE
from wn21k_zoo.cli.output import FormatOption, complete_record, print_table, to_write, warnings_as_messages
from wn21k_zoo.errors import CacheError, InvalidArgumentError, Wn21kError
from wn21k_zoo.messages import say

__all__ = ["app", "download", "lock", "verify"]

CacheDirOption = Annotated[
    Path | None, typer.Option("--cache-dir", help="Folder of the cache. Default: WN21K_CACHE, else the user's.")
]

app = typer.Typer(no_args_is_help=True, help="List and prune the cache.")


def download(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Records, timm models or hf-hub:ORG/NAME.", show_default=False, autocompletion=complete_record
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All records.")] = False,
    cache_dir: CacheDirOption = None,
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Fetch weights into the cache, verified; what is already there is verified again.

    Exit code 3 if some could not be fetched and the rest are there.
    """
    from wn21k_zoo.building import HUB_PREFIX, fetch_from_hub
    from wn21k_zoo.download import fetch

    wanted = [checkpoint.name for checkpoint in CHECKPOINTS] if everything else names or []
    if not wanted:
        raise InvalidArgumentError("Name at least one model, or use --all; wn21k list shows the records.")
    rows, failed = [], 0
    with warnings_as_messages(quiet=False):
        for name in dict.fromkeys(wanted):
            try:
                if name.startswith(HUB_PREFIX):
                    found = list(fetch_from_hub(name, cache_dir))
                else:
                    found = [fetch(registry.resolve_checkpoint(name), cache_dir=cache_dir)]
            except Wn21kError as error:
                failed += 1
                say(str(error))
                continue
            rows += [
                {
                    "name": name,
                    "status": "downloaded" if one.downloaded else "was here",
                    "bytes": one.num_bytes,
                    "sha256": one.sha256,
                    "checked_against": one.checked_against,
                    "file": str(one.path),
                }
                for one in found
            ]
    if rows:
        print_table(rows, ("name", "status", "bytes", "sha256", "checked_against", "file"), format)
    if failed:
        say(f"{failed} could not be fetched")
        raise typer.Exit(3 if rows else 1)


def verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Records or timm models. Default: every file in the cache.", autocompletion=complete_record
        ),
    ] = None,
    cache_dir: CacheDirOption = None,
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Hash the files on this machine and compare; nothing is fetched.

    Exit code 1 if a file is damaged, unreadable, missing, or unknown: nothing states its hash.
    """
    from wn21k_zoo.on_disk import UNKNOWN, cached_files, contents, find_verified

    root = _root(cache_dir, is_needed=not names)
    rows: list[dict[str, Any]] = []
    failed = False

    def tell(file: object, status: str, checked_against: str | None = None, problem: str | None = None) -> None:
        rows.append({"file": str(file), "status": status, "checked_against": checked_against, "problem": problem})

    for name in names or []:
        try:
            record = registry.resolve_checkpoint(name)
            found, damages = find_verified(record, root)
        except Wn21kError as error:
            failed = True
            say(str(error))
            continue
        if found is not None:
            tell(found.path, "ok", found.checked_against)
        for damage in damages:
            tell(damage.path, damage.status, problem=damage.problem)
        if found is None and not damages:
            there = [path for path in cached_files(record.sources, root) if path.is_file()]
            for path in there:
                tell(path, "unknown", problem=UNKNOWN)
            if not there:
                tell(name, "not on this machine")
    if not names:
        for each in contents(root):
            status, problem = each.status()
            tell(each.path, status, each.expected.stated_by, problem or None)
        if not rows:
            say(f"nothing in the cache {root}")
    if rows or not failed:
        print_table(rows, ("file", "status", "checked_against", "problem"), format)
    if failed or any(row["status"] != "ok" for row in rows):
        raise typer.Exit(1)


@app.command("list")
def list_cache(cache_dir: CacheDirOption = None, format: FormatOption = None) -> None:  # noqa: A002
    """List the files in the cache."""
    from wn21k_zoo.on_disk import contents

    root = _root(cache_dir)
    rows: list[dict[str, Any]] = [
        {
            "source": each.source,
            "bytes": each.path.stat().st_size,
            "sha256": each.receipt.sha256 if each.receipt else None,
            "file": str(each.path),
        }
        for each in contents(root)
        if each.path.is_file()
    ]
    print_table(rows, ("source", "bytes", "sha256", "file"), format)
    say(f"{root}: {len(rows)} files, {sum(row['bytes'] for row in rows) / 1e6:,.1f} MB")


@app.command()
def prune(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            help="Records, timm models or hf-hub:ORG/NAME. Default: unfinished downloads only.",
            autocompletion=complete_record,
        ),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All files.")] = False,
    older_than: Annotated[
        float | None, typer.Option("--older-than", min=0, help="Files not changed for this many days.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    cache_dir: CacheDirOption = None,
) -> None:
    """Remove files from the cache; without arguments only leftovers of downloads unfinished for more than a day."""
    from wn21k_zoo import cache
    from wn21k_zoo.building import HUB_PREFIX, hub_source
    from wn21k_zoo.on_disk import cached_files, contents

    root = _root(cache_dir)
    going = list(cache.leftovers(root))
    for name in names or []:
        is_on_hub = name.startswith(HUB_PREFIX)
        going += cached_files([hub_source(name)] if is_on_hub else registry.resolve_checkpoint(name).sources, root)
    if everything or older_than is not None:
        oldest = time.time() - (older_than or 0) * 24 * 3600
        there = [each.path for each in contents(root)]
        going += [path for path in there if everything or not path.is_file() or path.stat().st_mtime < oldest]
    if everything:
        going += list(cache.leftovers(root, older_than=0))
    freed = 0
    for path in dict.fromkeys(going):
        num_bytes = (path.lstat().st_size if path.is_file() else 0) if dry_run else cache.remove(path, root)
        if num_bytes is None:
            say(f"{path} stays: another process is fetching it")
            continue
        typer.echo(str(path))
        freed += num_bytes
    say(f"{freed / 1e6:,.1f} MB {'would be' if dry_run else 'are'} freed in {root}")


def _root(chosen: Path | None, is_needed: bool = True) -> Path:
    """The cache folder, which is created by the first download.

    Raises:
        CacheError: It is not a folder, or it is needed and there is none of a name that was given.
    """
    from wn21k_zoo import cache

    root = cache.cache_dir(chosen)
    if root.exists() and not root.is_dir():
        raise CacheError(f"The cache folder {root} is a file; name a folder with --cache-dir or WN21K_CACHE.")
    if is_needed and chosen is not None and not root.exists():
        raise CacheError(f"There is no folder {root} (--cache-dir).")
    return root


def lock(
    names: Annotated[list[str] | None, typer.Argument(help="Records. Default: all.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", callback=to_write, help=f"Default: the package's own {LOCK_FILE}.")
    ] = None,
) -> None:
    """For maintainers: ask all sources for revision, size and sha256, and write the lock file.

    Files on plain servers are fetched to be hashed. Exit code 3 if some sources could not be asked; what was known
    about them is kept.
    """
    from wn21k_zoo import hub, locking
    from wn21k_zoo.errors import OfflineError

    if hub.is_offline():
        raise OfflineError("wn21k lock asks all sources, and the network is switched off (HF_HUB_OFFLINE, --offline).")
    place = output or Path(__file__).parents[1] / "_data" / LOCK_FILE
    chosen = [registry.get_checkpoint(name) for name in names] if names else CHECKPOINTS
    done: list[str] = []

    def tell(source: str, problem: str | None) -> None:
        say(f"{source}: {problem or 'done'}")
        if problem is None:
            done.append(source)

    with warnings_as_messages(quiet=True):
        new, failed = locking.lock_sources(chosen, locking.read_lock(place if place.is_file() else None), tell)
    if done:
        locking.write_lock(new, place)
        say(f"{len(done)} sources written to {place}, {failed} could not be asked")
    elif not failed:
        say("there is nothing to write: weights in packages are pinned by their records")
    if failed:
        raise typer.Exit(3 if done else 1)
