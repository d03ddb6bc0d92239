"""Export a checkpoint as a repository folder for timm, transformers and this package, and upload it to the Hub."""

from __future__ import annotations

import dataclasses
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from wn21k_zoo import cards, convert, hub, registry
from wn21k_zoo.building import (
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
from wn21k_zoo.files import expanded
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.saving import CARD_FILE, UPLOADED, card_for, check_target, folder_config, folder_labels, write_export

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_repo_id", "export_folder", "plan_upload", "publish_folder"]

_LOG = logging.getLogger(__name__)


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
        InvalidArgumentError: The folder is not empty, the dtype is another one, weights are too large for float16, or
            the record of a file is not clear.
    """
    target = check_target(folder, dtype, force)
    checkpoint, module = _load(os.fspath(model), record)
    space = LabelSpace.load(checkpoint.label_space)
    settings = pretrained_config(checkpoint)
    config = folder_config(checkpoint.architecture, settings, module, space, checkpoint.head)
    return write_export(target, module, config, folder_labels(space, checkpoint.head), _card(checkpoint), dtype)


def plan_upload(folder: str | os.PathLike[str]) -> dict[Path, int]:
    """List the files of a folder that would go to the Hub, with their sizes in bytes; warns of a card without licence.

    Raises:
        InvalidArgumentError: There is no such folder.
        ModelError: It lacks a file, or its weights do not fit its configuration.
        PublishError: A file is a link to one elsewhere, or the card is missing, not UTF-8, or one that the Hub would
            refuse.
    """
    folder = expanded(folder, InvalidArgumentError)
    if not folder.is_dir():
        raise InvalidArgumentError(f"{folder} is not a folder; wn21k export writes one.")
    read_config(folder)
    if not (folder / WEIGHT_FILES[0]).is_file():
        raise WeightsNotFoundError(f"{folder} has no {WEIGHT_FILES[0]}; wn21k export writes it.")
    if not (folder / CARD_FILE).is_file():
        raise PublishError(f"{folder} has no {CARD_FILE}, and a model without a card is of little use to others.")
    for name in UPLOADED:
        path, real = folder / name, Path(os.path.realpath(folder / name))  # resolve() fails in a circle
        if path.is_symlink() and not (path.is_file() and real.is_relative_to(os.path.realpath(folder))):
            raise PublishError(f"{path} is a link to a file elsewhere, or to none; copy what to publish.")
    build_from_folder(folder, folder / WEIGHT_FILES[0])
    _check_card(folder / CARD_FILE)
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

    In the examples of its card, ``FOLDER`` becomes the repository.

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
        PublishError: Not logged in, the Hub refuses, or would refuse the card.
        ModelError: The folder cannot be loaded.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

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
        commit = client.create_commit(
            repo_id,
            [
                CommitOperationAdd(
                    path.name,
                    card_for(repo_id, revision, _card_text(path)).encode() if path.name == CARD_FILE else path,
                )
                for path in planned
            ],
            revision=revision,
            commit_message=commit_message or "Upload with wn21k_zoo",
        )
    except Exception as error:  # the Hub's client and its transport raise many kinds of errors
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = {
            401: "The token is not valid: log in again (hf auth login), or give another one in HF_TOKEN or token=. ",
            403: f"The token may not write to {repo_id.partition('/')[0]}: use one with write access to it. ",
        }.get(status or 0, "")
        raise PublishError(f"{repo_id} could not be published. {hint}({first_line(error)})") from error
    return str(commit.commit_url)


def _check_card(path: Path) -> None:
    """Check a card's metadata before anything is created on the Hub, and warn if they state no licence.

    Raises:
        PublishError: They cannot be read.
    """
    from huggingface_hub import ModelCard

    text = _card_text(path)
    try:
        stated = ModelCard(text).data.get("license") if text.lstrip().startswith("---") else None
    except Exception as error:  # the Hub's client, and its YAML parser, raise many kinds of errors
        raise PublishError(f"The metadata at the top of {path} are not valid: {first_line(error)}.") from error
    if not stated:
        _LOG.warning("%s states no licence (license: ... at its top), so others may not use the model", path)


def _card_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PublishError(f"{path} is not UTF-8 ({first_line(error)}); save it as UTF-8.") from error


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
    if path.suffix in (".pth", ".pt", ".bin", ".safetensors") and not path.exists():
        raise UnknownModelError(f"There is no file {path}.")
    if record is not None:
        raise InvalidArgumentError(f"record (--record) is for weight files, and {model} is not one.")
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


def _card(checkpoint: Checkpoint) -> str:
    if checkpoint not in CHECKPOINTS:
        checkpoint = dataclasses.replace(checkpoint, metrics=())
    checkout = cards.find_checkout()
    prose = cards.known_prose(checkpoint.name, checkout / cards.FOLDER if checkout else None)
    return cards.render_card(checkpoint, prose)
