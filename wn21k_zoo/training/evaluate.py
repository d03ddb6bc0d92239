"""Evaluate a model on a split: semantic and leaf accuracy, hierarchical errors, calibration, throughput."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from wn21k_zoo.checkpoints import Head
from wn21k_zoo.errors import DataError, DataOutputError, InvalidArgumentError, without_login
from wn21k_zoo.files import atomic_file, check_writable, local_path
from wn21k_zoo.models import LabelSpaceLike, ModelLike
from wn21k_zoo.running import check_logits, device_of, dtype_of, evaluating, memory_format, select_device
from wn21k_zoo.training.data import (
    Batch,
    FolderDataset,
    ImageDataset,
    Loader,
    is_class_folder,
    open_dataset,
    open_folder,
    open_folders,
)
from wn21k_zoo.training.evaluation import Evaluation, classes_with_images
from wn21k_zoo.training.folder import is_divided
from wn21k_zoo.training.storage import open_storage
from wn21k_zoo.training.subject import Subject, open_subject, take_size
from wn21k_zoo.training.tasks import count_cores
from wn21k_zoo.tree import SemanticTree

__all__ = ["evaluate"]

_LOG = logging.getLogger(__name__)


def evaluate(
    model: ModelLike,
    data: str | os.PathLike[str],
    *,
    split: str | None = None,
    which: str = "best",
    label_space: LabelSpaceLike | None = None,
    head: Head | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    device: str = "auto",
    precision: str = "fp32",
    with_ancestors: bool = False,
    max_bad: float = 0.01,
    predictions: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate a model on a split of a data set.

    In a multi-process program, each process that calls this evaluates the whole split and waits for no other.

    Args:
        model: A run's folder, the name of a record or of a timm model, an exported folder, ``hf-hub:ORG/NAME``, or a
            timm network with ``label_space``; its layers' modes are restored afterwards.
        data: Shards or a URL of them, mapped to the model's classes by synset; or a folder of class folders named by
            wnid (for classes that are not synsets, by class name).
        split: ``train``, ``validation``, ``test``, or for class folders ``all``: the first two. Default:
            ``validation``; but ``all`` for an undivided folder, unless the model is (or was exported from) a run that
            was trained on it, and so has seen nine in ten of its images.
        which: Checkpoint of a run, ``best`` or ``last``.
        label_space: Classes of a network, or of a folder's model that does not name them.
        head: How to read the outputs if the model does not say; as in :func:`wn21k_zoo.models.load_model`.
        cache_dir: Cache folder.
        image_size: Width and height of the images in pixels; default: the model's own. Networks are often best at a
            somewhat larger size than in training (arXiv 1906.06423). Position embeddings, if any, are resampled,
            except in a network of the caller's.
        batch_size: Images per batch.
        workers: Number of processes that load images; default: the cores of this machine, at most 16.
        device: auto (a network stays where it is), cpu, cuda, cuda:N or mps (where it stays afterwards).
        precision: fp32, bf16 or fp16; a network in bf16 or fp16 runs in its own precision instead of fp32. Convolutions
            in fp32 use TF32 on GPUs that have it unless ``torch.backends.cudnn.allow_tf32`` is False.
        with_ancestors: Count hierarchical errors in the tree of the classes and all synsets above them in WordNet, so
            that those of models over different classes can be compared; default: in the tree of the model's classes.
        max_bad: Share of damaged images that is tolerated; 1,000 times this number always are (ten for 0.01).
        predictions: CSV file with a row per image: ``image``, ``class`` and ``prediction`` (wnids, or the model's own
            names) and ``confidence``; it appears once it is complete. Predictions are leaves, see
            :class:`wn21k_zoo.training.evaluation.Evaluation`, so images of classes above them never get their own.
        progress: Called with the number of batches done and their total.

    Returns:
        The result of :meth:`wn21k_zoo.training.evaluation.Evaluation.compute`, plus ``per_class`` (``class``,
        ``images`` and ``top1`` of each leaf, the lowest first), ``images_per_second``, ``model``, ``source`` (as given,
        if by name), ``step`` (of a run), ``data``, ``label_space``, ``classes``, ``head``, ``hierarchy``, ``split``,
        ``input_size`` (channels, height and width), ``bad_samples``, ``left_out`` (images of classes that the model
        does not know) and ``device``. Semantic figures
        use the tree of the model's own classes; if that has one level (ImageNet-1K) there are none, and hierarchical
        ones use the tree with all synsets above the classes; ``hierarchy`` names it. Classes that are not synsets have
        neither.

    Raises:
        ModelError, UnknownModelError, LabelSpaceError, UnknownNameError, RunError: The model cannot be loaded, its
            outputs do not match its classes, or these are not known.
        DataError: The data cannot be read, or has none of the model's classes.
        DataOutputError: ``predictions`` cannot be written.
        InvalidArgumentError: A number is out of range; the network does not take images of ``image_size``; it is
            unknown how to prepare images for a network or read its outputs; two of its classes have the same name; or
            they are to have ancestors but are not synsets.
        NonFiniteError: The model's outputs are not finite.
    """
    dtypes = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        raise InvalidArgumentError(f"precision is {precision!r}; it can be {', '.join(dtypes)}.")
    if predictions is not None:
        check_writable(local_path(predictions, DataOutputError))
    chosen = device_of(model) if isinstance(model, nn.Module) and device == "auto" else select_device(device)
    subject = open_subject(model, which, label_space, head, cache_dir, image_size)
    if with_ancestors and subject.space is None:
        raise InvalidArgumentError(
            f"{subject.name} has classes of its own, which have no ancestors; evaluate it without them."
        )
    if split is None:
        has_parts = not is_class_folder(data) or is_divided(data) or _has_seen_but_a_tenth(subject, data)
        split = "validation" if has_parts else "all"
    dataset = _dataset(data, split, subject)
    if isinstance(dataset, FolderDataset) and dataset.share_in(subject.trained_on) > 0.5:
        _LOG.warning("%s was trained on most of these images, so it does better on them than on others", subject.name)
    tree = SemanticTree.from_label_space(subject.space) if subject.space else None
    layout = memory_format(chosen)
    module = subject.module.to(chosen)
    if not isinstance(model, nn.Module):  # the caller's own keeps its layout
        module.to(memory_format=layout)
    own = dtype_of(module)  # the caller's network may not be fp32
    dtype = dtypes[precision] or (own if own in (torch.bfloat16, torch.float16) else None)

    def run(images: Tensor) -> Any:
        with torch.autocast(chosen.type, dtype) if dtype is not None else contextlib.nullcontext():
            return module(images.double() if own == torch.float64 else images)

    if image_size is not None:
        take_size(subject, image_size, run, chosen, resample=not isinstance(model, nn.Module))
    evaluation = Evaluation(
        tree,
        subject.head,
        classes_with_images(dataset),
        device=chosen,
        over_ranks=False,
        num_classes=len(subject.classes),
        with_ancestors=with_ancestors,
    )
    loader = Loader(
        dataset,
        batch_size=batch_size,
        training=False,
        augmentation=subject.resize,
        workers=min(16, count_cores()) if workers is None else workers,
        device=chosen,
        max_bad=max_bad,
        names=predictions is not None,
    )
    total, begin = len(loader), time.perf_counter()
    with (
        contextlib.closing(loader),
        torch.inference_mode(),
        evaluating(module),
        _rows(predictions, subject.class_names) as write,
    ):
        for number, batch in enumerate(loader, start=1):
            if len(batch):  # otherwise all its images are damaged
                images = batch.images.contiguous(memory_format=layout)
                logits = run(images)
                check_logits(logits, len(batch), subject.classes, subject.name)
                write(batch, *evaluation.update(logits, batch.targets))
            progress(number, total)
        figures = evaluation.compute()
        seconds = time.perf_counter() - begin
    return {
        "model": subject.name,
        "source": without_login(os.fspath(model)) if isinstance(model, (str, os.PathLike)) else None,
        "step": subject.step,
        "data": without_login(os.fspath(data)),
        "label_space": subject.classes.name,
        "classes": len(subject.class_names),
        "head": subject.head,
        "split": split,
        "input_size": subject.input_size,
        **figures,
        "per_class": _per_class(evaluation, subject.class_names),
        "bad_samples": loader.bad_samples,
        "left_out": dataset.left_out,
        "images_per_second": figures["images"] / seconds,
        "device": chosen.type,
    }


def _per_class(evaluation: Evaluation, class_names: Sequence[str]) -> list[dict[str, Any]]:
    rows = [
        {"class": class_names[index], "images": images, "top1": 100 * right / images}
        for index, (images, right) in evaluation.classes.per_class().items()
    ]
    return sorted(rows, key=lambda row: row["top1"])


@contextlib.contextmanager
def _rows(
    place: str | os.PathLike[str] | None, class_names: Sequence[str]
) -> Iterator[Callable[[Batch, Tensor, Tensor], None]]:
    """Yield a function that writes a row per image with prediction and confidence; without a place it does nothing."""
    if place is None:
        yield lambda batch, predictions, confidences: None
        return
    path = local_path(place, DataOutputError)

    @contextlib.contextmanager
    def told() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataOutputError(f"{path} cannot be written: {error.strerror}; name another file.") from None

    with contextlib.ExitStack() as stack:
        with told():
            file = stack.enter_context(atomic_file(path))
        text = io.TextIOWrapper(cast(io.BufferedWriter, file), "utf-8", newline="", errors="surrogateescape")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(("image", "class", "prediction", "confidence"))

        def write(batch: Batch, predictions: Tensor, confidences: Tensor) -> None:
            columns = (each.tolist() for each in (batch.targets, predictions, confidences))
            with told():
                for name, target, prediction, confidence in zip(batch.names, *columns, strict=True):
                    table.writerow((name, class_names[target], class_names[prediction], f"{confidence:.6f}"))

        yield write
        with told():
            text.detach()
            stack.close()


def _has_seen_but_a_tenth(subject: Subject, data: str | os.PathLike[str]) -> bool:
    """Whether a model was trained on most of the training part of an undivided folder, and not on the rest."""
    if not subject.trained_on:
        return False
    try:
        seen, rest = (_mapped(folder, subject) for folder in open_folders(data))
    except DataError:  # one image of each class, or what all of it has as well
        return False
    return seen.share_in(subject.trained_on) > 0.5 >= rest.share_in(subject.trained_on)


def _dataset(data: str | os.PathLike[str], split: str, subject: Subject) -> ImageDataset:
    if not is_class_folder(data):
        if subject.space is None:
            open_storage(data)  # raises if there is nothing
            raise DataError(f"{subject.name} has classes of its own; give a folder of class folders named after them.")
        return open_dataset(data, split, label_space=subject.space)
    return _mapped(open_folder(data, split), subject)


def _mapped(folder: FolderDataset, subject: Subject) -> FolderDataset:
    if subject.space is not None:
        return folder.mapped_to(subject.space)
    return folder.mapped(subject.class_names, f"class of {subject.name}")
