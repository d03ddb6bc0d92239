"""Export a checkpoint as a repository folder for timm, transformers and this package, and upload it to the Hub."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from wn21k_zoo import cards, convert, hub, registry
from wn21k_zoo.architectures import ARCHITECTURES
from wn21k_zoo.building import (
    CONFIG_FILE,
    about_run,
    build_checkpoint,
    build_from_folder,
    is_repo_id,
    pretrained_config,
    read_config,
)
from wn21k_zoo.checkpoints import CHECKPOINTS, WEIGHT_FILES, Checkpoint
from wn21k_zoo.errors import (
    ConversionError,
    InvalidArgumentError,
    OfflineError,
    PublishError,
    UnknownModelError,
    WeightsNotFoundError,
    first_line,
)
from wn21k_zoo.files import expanded, is_hidden, local_path, replace
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.registry import TIMM_PREFIX
from wn21k_zoo.tree import SemanticTree

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "DTYPES",
    "LABELS_FILE",
    "check_repo_id",
    "check_target",
    "export_folder",
    "folder_config",
    "folder_labels",
    "plan_upload",
    "publish_folder",
    "synset_config",
    "write_export",
]

CARD_FILE = "README.md"
LABELS_FILE = "wn21k_labels.json"
DTYPES = ("float32", "float16", "bfloat16")
_TEMPORARY = ".wn21k-export-"
# The files of a folder that are uploaded: what we wrote, and nothing else that may be there.
UPLOADED = (CARD_FILE, CONFIG_FILE, LABELS_FILE, WEIGHT_FILES[0])
RECORD_FILE = "record.py"
_WRITTEN = (*UPLOADED, RECORD_FILE)


def export_folder(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    record: str | None = None,
    dtype: str | None = None,
    force: bool = False,
) -> Path:
    """Write ``model.safetensors``, ``config.json``, ``wn21k_labels.json`` and a card.

    The configuration has readable label names, with the wnid appended where several classes share a name, the
    preprocessing in the form that timm and transformers honour and, for this package, wnids and the kind of head.
    ``wn21k_labels.json`` has the last two for other programs, and a tree as the index of each node's parent. The folder
    appears only once it is complete.

    Args:
        model: A record's name, a timm name with a known label space, or a published weight file.
        folder: Output folder.
        record: Record of a weight file, needed where several have its architecture and number of classes.
        dtype: Data type of the weights, unchanged by default: 'float32', 'float16' or 'bfloat16'.
        force: Replace the folder of a former export.

    Returns:
        The folder.

    Raises:
        UnknownModelError, UnresolvedLabelSpaceError, ModelError, MissingExtraError: The model cannot be loaded.
        InvalidArgumentError: The folder is not empty, the dtype is another one, or the record of a file is not clear.
    """
    target = check_target(folder, dtype, force)
    checkpoint, module = _load(os.fspath(model), record)
    space = LabelSpace.load(checkpoint.label_space)
    config, labels = synset_config(checkpoint, module, space), folder_labels(checkpoint, space)
    return write_export(target, module, config, labels, _card(checkpoint), dtype)


def check_target(folder: str | os.PathLike[str], dtype: str | None, force: bool) -> Path:
    """Return the absolute path of a folder for an export; leftovers of a killed export there are removed.

    Raises:
        InvalidArgumentError: It is a file, is not empty, or holds what no export writes; the dtype is another one.
    """
    target = Path(os.path.realpath(local_path(folder, InvalidArgumentError)))  # also for circular links
    if dtype is not None and dtype not in DTYPES:
        raise InvalidArgumentError(f"dtype is {dtype!r}; it can be {', '.join(DTYPES)}.")
    if target.exists() and not target.is_dir():
        raise InvalidArgumentError(f"{target} is a file; name a folder.")
    there = target.iterdir() if target.is_dir() else ()
    others = [path for path in there if not is_hidden(path.name)]  # not .git, .DS_Store
    if others and not force:
        raise InvalidArgumentError(
            f"{target} is not empty; choose another folder, or replace it with force=True (--force)."
        )
    for left in target.glob(f"{_TEMPORARY}*"):  # of an export that was killed
        shutil.rmtree(left, ignore_errors=True)
    foreign = [path.name for path in others if path.name not in _WRITTEN or not path.is_file()]
    if foreign:
        raise InvalidArgumentError(f"{target} holds {min(foreign)}, which no export writes; choose another folder.")
    return target


def write_export(
    target: Path,
    module: nn.Module,
    config: Mapping[str, Any],
    labels: Mapping[str, Any] | None,
    card: str,
    dtype: str | None = None,
    record: str | None = None,
) -> Path:
    """Write weights, configuration, labels, card and draft of a record; they appear only once all are complete.

    Raises:
        PublishError: It cannot be written.
        ModelError: What was written cannot be loaded.
    """
    with _whole_folder(target) as temporary:
        _write_weights(module, temporary / WEIGHT_FILES[0], dtype)
        _write_json(config, temporary / CONFIG_FILE)
        if labels is not None:
            _write_json(labels, temporary / LABELS_FILE)
        (temporary / CARD_FILE).write_text(card, encoding="utf-8", newline="\n")
        if record is not None:
            (temporary / RECORD_FILE).write_text(record, encoding="utf-8", newline="\n")
        build_from_folder(temporary, temporary / WEIGHT_FILES[0])  # checks that what was written can be loaded
    return target


def plan_upload(folder: str | os.PathLike[str]) -> dict[Path, int]:
    """List the files of a folder that would go to the Hub, with their sizes in bytes.

    Raises:
        InvalidArgumentError: There is no such folder.
        ModelError: It lacks a file, or its weights do not fit its configuration.
    """
    folder = expanded(folder, InvalidArgumentError)
    if not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is not a folder; wn21k export writes one.")
    read_config(folder)
    if not (folder / WEIGHT_FILES[0]).is_file():
        raise WeightsNotFoundError(f"{folder} has no {WEIGHT_FILES[0]}; wn21k export writes it.")
    if not (folder / CARD_FILE).is_file():
        raise PublishError(f"{folder} has no {CARD_FILE}, and a model without a card is of little use to others.")
    build_from_folder(folder, folder / WEIGHT_FILES[0])
    return {folder / name: (folder / name).stat().st_size for name in UPLOADED if (folder / name).is_file()}


def publish_folder(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Push a folder to the Hugging Face Hub; the repository and the branch are created if missing.

    Args:
        folder: A folder written by :func:`export_folder`.
        repo_id: ``ORG/NAME``.
        private: Make a new repository private.
        revision: Branch, by default main.
        commit_message: Message of the commit.
        token: Access token; by default ``HF_TOKEN``, or that of ``hf auth login``.

    Returns:
        URL of the commit.

    Raises:
        InvalidArgumentError: There is no such folder, or the repository name is not valid.
        OfflineError: The network is switched off.
        PublishError: Not logged in, or the Hub refuses.
        ModelError: The folder cannot be loaded.
    """
    from huggingface_hub import HfApi, get_token

    check_repo_id(repo_id)
    planned = plan_upload(folder)
    if hub.is_offline():
        raise OfflineError(f"{repo_id} cannot be published: the network is switched off (HF_HUB_OFFLINE, --offline).")
    if token is None and get_token() is None:
        raise PublishError(
            "Publishing needs a login: run hf auth login, or give a token with write access in HF_TOKEN or token=."
        )
    client = HfApi(token=token, library_name="wn21k_zoo")
    try:
        client.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and revision != "main":
            client.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = client.upload_folder(
            repo_id=repo_id,
            folder_path=expanded(folder, InvalidArgumentError),
            allow_patterns=[path.name for path in planned],
            revision=revision,
            commit_message=commit_message or "Upload with wn21k_zoo",
        )
    except Exception as error:  # the Hub's client and its transport raise many kinds of errors
        raise PublishError(f"{repo_id} could not be published: {first_line(error)}") from error
    return str(commit.commit_url)


def check_repo_id(repo_id: str) -> None:
    """Check that a text can be the name of a repository.

    Raises:
        InvalidArgumentError: It cannot.
    """
    if not is_repo_id(repo_id):
        raise InvalidArgumentError(f"{repo_id!r} is not a repository name; write ORG/NAME.")


def _load(model: str, record: str | None) -> tuple[Checkpoint, nn.Module]:
    path = expanded(model, UnknownModelError)
    if path.is_file():
        converted = convert.convert_file(path, registry.get_checkpoint(record).architecture if record else None)
        checkpoint = _record_of(converted, record)
        module = build_checkpoint(checkpoint, pretrained=False)
        try:
            module.load_state_dict(converted.state_dict, strict=True)
        except RuntimeError as error:
            raise ConversionError(f"{path} does not fit {checkpoint.name}: {first_line(error)}") from error
        return checkpoint, module
    if record is not None:
        raise InvalidArgumentError(f"record (--record) is for weight files, and {model} is not one.")
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") and not path.exists():
        raise UnknownModelError(f"There is no file {path}.")
    try:
        checkpoint = registry.resolve_checkpoint(model)
    except UnknownModelError as error:
        if not model or not path.is_dir():
            raise
        taken = "is a folder; export takes a record's name, a timm model or a weight file."
        raise InvalidArgumentError(f"{model} {about_run(path) or taken}") from error
    return checkpoint, build_checkpoint(checkpoint, pretrained=True)


def _record_of(converted: convert.Converted, record: str | None) -> Checkpoint:
    fitting = [
        checkpoint
        for checkpoint in CHECKPOINTS
        if checkpoint.architecture == converted.architecture
        and len(LabelSpace.load(checkpoint.label_space)) == converted.num_classes
    ]
    what = f"{converted.architecture} with {converted.num_classes:,} outputs"
    if record is not None:
        checkpoint = registry.get_checkpoint(record)
        if checkpoint not in fitting:
            raise InvalidArgumentError(f"The file is {what}, but {record} is not.")
        return checkpoint
    if len(fitting) != 1:
        names = ", ".join(checkpoint.name for checkpoint in fitting) or "none"
        raise InvalidArgumentError(f"Records of {what}: {names}; choose one with record (--record).")
    return fitting[0]


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """Make a temporary folder whose files become the target's at the end; it is removed if something fails.

    It is next to a new target, whose place it takes, but inside an existing one, which may be a mount point or the
    current folder.
    """
    exists = target.is_dir()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Not by tempfile, whose folders only their owner can use.
        temporary = (target if exists else target.parent) / f"{_TEMPORARY}{secrets.token_hex(8)}"
        temporary.mkdir()
    except OSError as error:
        raise PublishError(f"{target} cannot be written ({error.strerror}); choose another place.") from error
    try:
        yield temporary
        if exists:
            _replace_files(target, temporary)
        else:
            replace(temporary, target, patience=10)
    except OSError as error:
        raise PublishError(f"{target} cannot be written ({first_line(error)}); choose another place.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_files(target: Path, temporary: Path) -> None:
    """Remove the configuration first and add it last: without it a mixture of old and new files cannot be loaded."""
    new = sorted(temporary.iterdir(), key=lambda path: path.name == CONFIG_FILE)
    former = temporary / "former"
    former.mkdir()
    try:
        for name in (CONFIG_FILE, *(name for name in _WRITTEN if name != CONFIG_FILE)):
            if (target / name).is_file():
                replace(target / name, former / name)
        for path in new:
            replace(path, target / path.name)
    except OSError:
        for path in former.iterdir():
            replace(path, target / path.name)
        raise


def _write_weights(module: nn.Module, path: Path, dtype: str | None) -> None:
    import torch

    kind = getattr(torch, dtype) if dtype else None
    state = {
        key: value.to(kind) if kind is not None and value.is_floating_point() else value
        for key, value in module.state_dict().items()
    }
    convert.write_safetensors(state, path)


def _write_json(content: Any, path: Path) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n")


def folder_config(
    checkpoint: Checkpoint, module: nn.Module, names: Sequence[str], definitions: Sequence[str] = ()
) -> dict[str, Any]:
    """Make timm's configuration without ``model_args``: transformers fails if these repeat the number of classes."""
    own = checkpoint.architecture in ARCHITECTURES
    settings = {key: value for key, value in pretrained_config(checkpoint, len(names)).items() if key != "architecture"}
    described = {"label_descriptions": dict(zip(names, definitions, strict=True))} if definitions else {}
    return {
        "architecture": f"{TIMM_PREFIX}{checkpoint.architecture}" if own else checkpoint.architecture,
        "num_classes": len(names),
        "num_features": cast(Any, module).num_features,
        "label_names": list(names),
        **described,
        "pretrained_cfg": settings,
    }


def synset_config(checkpoint: Checkpoint, module: nn.Module, space: LabelSpace) -> dict[str, Any]:
    """As :func:`folder_config` for synsets, plus how to read the outputs, as other programs copy this file alone."""
    return folder_config(checkpoint, module, space.unique_names, space.definitions) | _outputs(checkpoint, space)


def _outputs(checkpoint: Checkpoint, space: LabelSpace) -> dict[str, Any]:
    return {"label_space": space.name, "head": checkpoint.head, "wnids": list(space.wnids)}


def folder_labels(checkpoint: Checkpoint, space: LabelSpace) -> dict[str, Any]:
    """Make what timm does not ask for: the kind of head, the wnids and a tree."""
    own = checkpoint.head == "semantic_softmax"
    tree = SemanticTree.from_label_space(space) if own else SemanticTree.load("fall11")
    return {
        "about": (
            "wnids: WordNet 3.0 noun id of each output. head: how outputs become probabilities; semantic_softmax is a "
            "softmax over the outputs of each depth. tree: nodes with the index of each one's parent, -1 for a root; a "
            "node's depth is the number of its ancestors."
        ),
        "digest": space.digest,
        **_outputs(checkpoint, space),
        "tree": {"name": tree.name, "wnids": list(tree.wnids), "parents": tree.parents.tolist()},
    }


def _card(checkpoint: Checkpoint) -> str:
    if checkpoint not in CHECKPOINTS:
        checkpoint = dataclasses.replace(checkpoint, metrics=())
    checkout = cards.find_checkout()
    prose = cards.known_prose(checkpoint.name, checkout / cards.FOLDER if checkout else None)
    return cards.render_card(checkpoint, prose)
