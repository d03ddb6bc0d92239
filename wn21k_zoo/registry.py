"""Resolve names to checkpoints: our records first, then timm's pretrained configurations.

The label space of a timm configuration follows from two things that must agree: the number of classes of its head and
the data set that its tag names last (``..._in22k_ft_in1k`` is a head over ImageNet-1K). Without such a tag it is not
guessed from the class count.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from wn21k_zoo.checkpoints import CHECKPOINTS, Checkpoint, HubSource, Resize, Source, URLSource
from wn21k_zoo.errors import InvalidArgumentError, UnknownModelError, UnresolvedLabelSpaceError, did_you_mean

__all__ = [
    "TIMM_PREFIX",
    "find_record",
    "get_checkpoint",
    "is_known",
    "list_checkpoints",
    "records_of",
    "resolve_checkpoint",
]

# Prefix of our names in timm's registry; a folder may also name an architecture with it.
TIMM_PREFIX = "wn21k_"

_BY_NAME: Mapping[str, Checkpoint] = MappingProxyType({checkpoint.name: checkpoint for checkpoint in CHECKPOINTS})

# number of classes -> (label space, the data set that the tag must name last)
_BY_NUM_CLASSES: Mapping[int, tuple[str, str]] = MappingProxyType(
    {
        1_000: ("imagenet1k", "in1k"),
        11_821: ("imagenet12k", "in12k"),
        21_841: ("imagenet22k", "in22k"),
        21_842: ("imagenet22k_ms", "in22k"),
        21_843: ("imagenet21k_goog", "in21k"),
    }
)
_DATA_SET_IN_TAG = re.compile(r"in[0-9]+k")
_CROP_MODES: Mapping[str, Resize] = MappingProxyType({"center": "crop", "squash": "squash", "border": "border"})


def list_checkpoints(pattern: str = "*") -> tuple[str, ...]:
    """Names of the records that match a shell pattern, in the catalogue's order.

    Raises:
        InvalidArgumentError: ``pattern`` is not a text.
    """
    if not isinstance(pattern, str):
        raise InvalidArgumentError(f"pattern is {pattern!r}; give one text, such as '*resnet*'.")
    return tuple(fnmatch.filter(_BY_NAME, pattern))


def get_checkpoint(name: str) -> Checkpoint:
    """Return the record of that name.

    Raises:
        UnknownModelError: There is none; the message gives the nearest names.
    """
    if isinstance(name, str) and name in _BY_NAME:
        return _BY_NAME[name]
    hint = did_you_mean(str(name), _BY_NAME)
    raise UnknownModelError(f"No checkpoint is called {name!r}.{hint} wn21k list shows all.")


def resolve_checkpoint(name: str) -> Checkpoint:
    """Return the record of that name, or one made from timm's pretrained configuration of that name.

    Raises:
        UnknownModelError: Neither we nor timm have pretrained weights of that name.
        UnresolvedLabelSpaceError: timm has them, but the classes of their head are not a known label space.
    """
    if not isinstance(name, str):
        return get_checkpoint(name)  # raises
    if name.startswith(TIMM_PREFIX):  # what timm calls our records
        name = name.removeprefix(TIMM_PREFIX)
        return records_of(name)[0] if records_of(name) else get_checkpoint(name)
    return _BY_NAME[name] if name in _BY_NAME else _from_timm(name)


def records_of(stem: str) -> tuple[Checkpoint, ...]:
    """Our records named ``STEM.TAG``, starting with the one that ``wn21k_STEM`` refers to."""
    return tuple(checkpoint for checkpoint in CHECKPOINTS if checkpoint.name.partition(".")[0] == stem)


def find_record(architecture: str, tag: str) -> Checkpoint | None:
    """The record with that architecture, as named in a configuration file, and tag; None if there is none."""
    architecture = architecture.removeprefix(TIMM_PREFIX)
    for checkpoint in CHECKPOINTS:
        stem, _, own_tag = checkpoint.name.partition(".")
        if architecture in (stem, checkpoint.architecture) and tag == own_tag:
            return checkpoint
    return None


def is_known(name: str) -> bool:
    """Whether a record or weights of timm's have that name, even if their classes are not known."""
    try:
        resolve_checkpoint(name)
    except UnresolvedLabelSpaceError:
        return True
    except UnknownModelError:
        return False
    return True


def _from_timm(name: str) -> Checkpoint:
    from timm.data import resolve_data_config

    config = _timm_config(name)
    full_name = f"{config.architecture}.{config.tag}" if config.tag else config.architecture
    if full_name in _BY_NAME:  # a bare architecture for whose default weights we have a record
        return _BY_NAME[full_name]
    settings = resolve_data_config({}, pretrained_cfg=config.to_dict(), verbose=False)
    return Checkpoint(
        name=full_name,
        architecture=config.architecture,
        label_space=_label_space_name(full_name, config),
        head="softmax",
        input_size=tuple(settings["input_size"]),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
        interpolation=settings["interpolation"],
        resize=_CROP_MODES[settings["crop_mode"]],
        crop_pct=settings["crop_pct"],
        sources=_sources(full_name, config),
        license=config.license,
        paper=f"https://arxiv.org/abs/{config.paper_ids[6:]}" if str(config.paper_ids).startswith("arXiv:") else None,
        origin=config.origin_url,
    )


def _timm_config(name: str) -> Any:
    import timm
    from timm.models import get_pretrained_cfg, is_model, split_model_name_tag

    architecture, tag = split_model_name_tag(name)
    if not is_model(architecture):
        known = {*_BY_NAME, *timm.list_models(), *timm.list_models(pretrained=True)}
        raise UnknownModelError(
            f"No model is called {name!r}.{did_you_mean(name, known)} wn21k list shows ours, timm.list_models() timm's."
        )
    try:
        config = get_pretrained_cfg(name)
    except RuntimeError as error:
        known = {*_BY_NAME, *timm.list_models(f"{architecture}.*", pretrained=True)}
        raise UnknownModelError(
            f"There are no weights {tag!r} for {architecture}.{did_you_mean(name, known)}"
        ) from error
    if config is None:
        raise UnknownModelError(f"timm knows {name!r} only as an old name; use the new one, ARCHITECTURE.TAG.")
    if not (config.hf_hub_id or config.url):
        raise UnknownModelError(f"timm has the architecture {architecture!r}, but no pretrained weights of that name.")
    return config


def _label_space_name(full_name: str, config: Any) -> str:
    known = _BY_NUM_CLASSES.get(config.num_classes)
    data_sets = _DATA_SET_IN_TAG.findall(config.tag or "")
    if known and data_sets and data_sets[-1] == known[1]:
        return known[0]
    if not config.num_classes:
        reason = "it has no classifier"
    elif not known:
        reason = f"no known label space has its {config.num_classes:,} outputs"
    else:
        reason = f"its {config.num_classes:,} outputs fit {known[0]}, but its tag does not say {known[1]}"
    raise UnresolvedLabelSpaceError(
        f"The classes of {full_name} are not known: {reason}. Choose another model, or build it yourself and give "
        "both the module and its label_space."
    )


def _sources(full_name: str, config: Any) -> tuple[Source, ...]:
    if config.hf_hub_id:
        repo_id, _, revision = config.hf_hub_id.partition("@")
        repo_id = f"timm/{full_name}" if repo_id == "timm/" else repo_id
        return (HubSource(repo_id=repo_id, revision=revision or None),)
    return (URLSource(url=config.url),)
