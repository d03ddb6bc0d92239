"""Images in, predictions out.

The module is called ``predictor`` because ``wn21k_zoo.predict`` is the function.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, cast, overload

from wn21k_zoo import models, registry
from wn21k_zoo.checkpoints import Head
from wn21k_zoo.errors import (
    ImageError,
    InvalidArgumentError,
    ModelError,
    Wn21kError,
    check_share,
    first_line,
    is_out_of_memory,
    whole_number,
)
from wn21k_zoo.images import check_resized, describe_source, load_image
from wn21k_zoo.labels import ClassNames
from wn21k_zoo.models import LabelSpaceLike, LoadedModel
from wn21k_zoo.prediction import Prediction
from wn21k_zoo.reading import NamesReader, TreeReader, default_tree
from wn21k_zoo.running import check_logits, device_of, dtype_of, evaluating, memory_format, select_device
from wn21k_zoo.tree import SemanticTree

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from wn21k_zoo.images import ImageLike
    from wn21k_zoo.models import ModelLike

    # What type checkers can tell apart; an array can be one image or several.
    OneImage = str | os.PathLike[str] | Image.Image | bytes | bytearray | memoryview | BinaryIO
    SeveralImages = list[Any] | tuple[Any, ...] | Iterator[Any]

__all__ = ["Predictor", "predict"]

Errors = Literal["raise", "return"]
Result = Prediction | Wn21kError


class Predictor:
    """A model that is ready for any number of images.

    Args:
        model: A record's name, a timm model name with a known label space, a folder with ``config.json`` and weights,
            ``hf-hub:ORG/NAME``, a torch module (with ``label_space``; traced or exported ones in evaluation mode), or
            None for the default (:func:`wn21k_zoo.models.choose_default`). A named model is never replaced by another.
        top_k: How many labels per level, and how many outputs, a prediction lists.
        threshold: Confidence in [0, 1] that ``Prediction.label`` must reach.
        device: 'auto' (CUDA, else MPS, else CPU; a module stays where it is) or a torch device.
        batch_size: Images per forward pass; by default 8 on a CPU, whose caches favour small batches, and 32 elsewhere.
        tree: Tree of the labels: a shipped tree's name, a file of wnids or a :class:`SemanticTree`. By default fall11,
            or winter21 for a head over its classes; for a semantic softmax always the tree over its classes. Not
            allowed for classes that are not synsets; the attribute ``tree`` is then None.
        label_space: Classes of the outputs of a module or a folder; :class:`ClassNames` if they are not synsets, or
            ``own`` for the folder's own names.
        head: How to read the outputs of a module, or of a folder that does not say: ``semantic_softmax``, ``softmax``
            or ``sigmoid``; see :func:`wn21k_zoo.models.load_model`.
        transform: From an RGB PIL image to a float tensor [3, H, W], instead of the model's own preprocessing.
        allow_url: Whether images may be URLs.
        cache_dir: Cache folder.

    Raises:
        InvalidArgumentError: A value that is not allowed.
        UnknownTreeError, TreeError, LabelSpaceError: A tree that is unknown, unreadable or does not fit the head.
        Wn21kError: As :func:`wn21k_zoo.models.load_model`.

    Example:
        >>> predictor = Predictor("efficientnet_lite0.embedded_in1k")
        >>> predictor("sample:cat").label.name
        'domestic cat, house cat, Felis domesticus, Felis catus'
    """

    def __init__(
        self,
        model: ModelLike | LoadedModel | None = None,
        *,
        top_k: int = 5,
        threshold: float = 0.5,
        device: str | torch.device = "auto",
        batch_size: int | None = None,
        tree: str | os.PathLike[str] | SemanticTree | None = None,
        label_space: LabelSpaceLike | None = None,
        head: Head | None = None,
        transform: Callable[[Any], torch.Tensor] | None = None,
        allow_url: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        self.top_k = whole_number("top_k", top_k, 1)
        chosen_batch_size = None if batch_size is None else whole_number("batch_size", batch_size, 1)
        self.threshold = check_share("threshold", threshold)
        self.allow_url = allow_url
        # Before the model: a wrong name should not cost a download.
        chosen_tree = None if tree is None else SemanticTree.find(tree)
        chosen_device = select_device(device) if device != "auto" else None
        if not isinstance(model, LoadedModel):
            model = models.load_model(model, label_space=label_space, head=head, cache_dir=cache_dir)
        self.name = model.name
        self.label_space = model.label_space
        self.head = model.head
        self.device = chosen_device or (select_device() if model.owned else device_of(model.module))
        self.batch_size = chosen_batch_size or (8 if self.device.type == "cpu" else 32)
        self.module = model.module.to(self.device) if model.owned or chosen_device else model.module
        self._owned = model.owned
        if model.owned:
            self.module.to(memory_format=self._memory_format)
        self.transform = transform or _own_transform(model)
        self._short_side = None if transform else models.short_side(model.data_config or {})
        self.tree: SemanticTree | None = None
        self._reader: TreeReader | NamesReader
        if isinstance(model.label_space, ClassNames):
            if chosen_tree is not None:
                raise InvalidArgumentError(
                    f"The classes of {self.name} are not synsets and are in no tree; leave out tree."
                )
            self._reader = NamesReader(model.label_space, self.head)
        else:
            self.tree = chosen_tree or default_tree(model.label_space, model.head)
            self._reader = TreeReader(self.tree, model.label_space, self.head, self.device)

    @overload
    def __call__(self, images: OneImage, *, errors: Literal["raise"] = "raise") -> Prediction: ...
    @overload
    def __call__(self, images: OneImage, *, errors: Errors) -> Result: ...
    @overload
    def __call__(self, images: SeveralImages, *, errors: Literal["raise"] = "raise") -> list[Prediction]: ...
    @overload
    def __call__(self, images: SeveralImages, *, errors: Errors) -> list[Result]: ...
    @overload
    def __call__(self, images: ImageLike | Iterable[ImageLike], *, errors: Errors = "raise") -> Any: ...
    def __call__(self, images: Any, *, errors: Errors = "raise") -> Any:
        """Predict one image, or several in their order.

        Args:
            images: An image as :func:`wn21k_zoo.images.load_image` takes it, or an iterable of them; an array or
                tensor with four dimensions counts as several, and so does a column of paths or images.
            errors: 'raise' the first error, or 'return' each in place of its prediction.

        Returns:
            A :class:`Prediction`, or a list of predictions (and errors).

        Raises:
            ImageError: An image that cannot be used (``errors='raise'``).
            ModelError: The model cannot be run.
        """
        if errors not in ("raise", "return"):
            raise InvalidArgumentError(f"errors is {errors!r}; it can be 'raise' or 'return'.")
        several = _is_several(images)
        results: list[Result] = []
        for result in self.stream(images if several else [images]):
            if errors == "raise" and isinstance(result, Wn21kError):
                raise result
            results.append(result)
        return results if several else results[0]

    def read(self, outputs: Any) -> list[Prediction]:
        """Make predictions from outputs computed elsewhere, such as by ONNX Runtime with an export of the network.

        Args:
            outputs: Outputs of the head before any softmax or sigmoid, [B, N]: a tensor or an array.

        Raises:
            InvalidArgumentError: They are something else, such as those of a softmax, or some are NaN or infinite.
        """
        import numpy as np
        import torch

        try:
            if isinstance(outputs, torch.Tensor):
                given = outputs
            else:
                array = np.asarray(outputs)
                given = torch.from_numpy(np.array(array, np.float16 if array.dtype == np.float16 else np.float32))
            is_half = given.dtype in (torch.float16, torch.bfloat16)
            logits = given.detach().to(self.device, given.dtype if is_half else torch.float32)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidArgumentError(
                f"outputs must be a tensor or an array of numbers: {first_line(error)}"
            ) from error
        classes = len(self.label_space)
        if logits.ndim != 2 or logits.shape[1] != classes:
            raise InvalidArgumentError(
                f"outputs must have the shape [images, {classes}], one for each class of {self.label_space.name}; they "
                f"have {list(logits.shape)}."
            )
        predictions = []
        for row, found in enumerate(self._read(logits, InvalidArgumentError)):
            if found is None:
                raise InvalidArgumentError(f"Row {row} of the outputs is NaN or infinite.")
            predictions.append(self._made(found, None))
        return predictions

    def stream(self, images: Iterable[ImageLike], *, read_ahead: bool = True) -> Iterator[Result]:
        """Yield predictions in the order of the images, each error in its place, with only a few batches in memory.

        Args:
            images: Any number of images.
            read_ahead: Decode the next batch while the model runs on this one. Without it, no more than one batch is
                taken before its results are yielded, for a source that waits for them.

        Raises:
            InvalidArgumentError: ``images`` is a single image.
            ModelError: The model cannot be run.
        """
        if not _is_several(images):
            raise InvalidArgumentError(
                f"stream takes an iterable of images, not one {type(images).__name__}; call the predictor itself."
            )
        return self._stream(images, read_ahead)

    def _stream(self, images: Iterable[ImageLike], read_ahead: bool) -> Iterator[Result]:
        ahead = self.batch_size if read_ahead else 0
        waiting: deque[tuple[str | None, Future[torch.Tensor]]] = deque()
        remaining = iter(images)
        workers = ThreadPoolExecutor(min(8, os.cpu_count() or 1), "wn21k-decode")
        waits = True
        try:
            while True:
                for image in itertools.islice(remaining, self.batch_size + ahead - len(waiting)):
                    waiting.append((describe_source(image), self._submit(workers, image)))
                if not waiting:
                    return
                batch = [waiting.popleft() for _ in range(min(self.batch_size, len(waiting)))]
                yield from self._predict_batch(batch)
        except KeyboardInterrupt:
            waits = False  # the image that is being read may be a pipe
            raise
        finally:
            workers.shutdown(waits, cancel_futures=True)  # after an early stop, do not wait for what is still queued

    def __repr__(self) -> str:
        return (
            f"Predictor({self.name!r}, label_space={self.label_space.name!r}, tree={self._tree_name!r}, {self.device})"
        )

    @property
    def _memory_format(self) -> torch.memory_format:
        """The layout in which convolutions are fastest (benchmarks/predict.py); a caller's module is left as it is."""
        return memory_format(self.device, channels_last=self._owned)

    @property
    def _tree_name(self) -> str:
        return self.tree.name if self.tree is not None else self.label_space.name

    def _submit(self, workers: ThreadPoolExecutor, image: ImageLike) -> Future[torch.Tensor]:
        # A source may write the next image into the same memory before a worker has read this one.
        if isinstance(image, (bytearray, memoryview)):
            image = bytes(image)
        elif not isinstance(image, (str, os.PathLike, bytes)):  # a file object has a state that threads must not share
            try:
                image = _loaded(image)
            except Wn21kError as error:
                failed: Future[torch.Tensor] = Future()
                failed.set_exception(error)
                return failed
        return workers.submit(self._prepare, image)

    def _prepare(self, image: ImageLike) -> torch.Tensor:
        rgb = _loaded(image, allow_url=self.allow_url)
        name = describe_source(image) or "The image"
        if self._short_side is not None:
            check_resized(rgb.size, self._short_side, name)
        try:
            return self.transform(rgb)
        except Exception as error:  # a transform can be the user's own
            raise ImageError(f"{name} could not be preprocessed ({first_line(error)}).") from error

    def _predict_batch(self, batch: list[tuple[str | None, Future[torch.Tensor]]]) -> Iterator[Result]:
        outcomes: list[torch.Tensor | Wn21kError] = []
        for _, future in batch:
            try:
                outcomes.append(future.result())
            except Wn21kError as error:
                outcomes.append(error)
        usable = [outcome for outcome in outcomes if not isinstance(outcome, Wn21kError)]
        found = iter(self._run(usable) if usable else [])
        for (source, _), outcome in zip(batch, outcomes, strict=True):
            yield outcome if isinstance(outcome, Wn21kError) else self._prediction(next(found), source)

    def _run(self, tensors: list[torch.Tensor]) -> list[dict[str, Any] | None]:
        """Return what is found in each image, None where the outputs are not finite."""
        import torch

        try:
            with torch.inference_mode():
                pixels = torch.stack(tensors).to(self.device, dtype_of(self.module))
                with evaluating(self.module):
                    logits = self.module(pixels.contiguous(memory_format=self._memory_format))
                check_logits(logits, len(tensors), self.label_space, self.name)
                return self._read(logits, ModelError)
        except (RuntimeError, ValueError, TypeError, AttributeError, AssertionError) as error:
            if isinstance(error, Wn21kError):
                raise
            hint = " Try a smaller batch size." if is_out_of_memory(error) else ""
            raise ModelError(f"{self.name} cannot be run on these images: {first_line(error)}{hint}") from error

    def _read(self, logits: torch.Tensor, error: type[Wn21kError]) -> list[dict[str, Any] | None]:
        finite = logits.isfinite().all(dim=-1)
        usable = logits[finite]
        self._refuse_probabilities(usable, error)
        found = iter(self._reader(usable, self.top_k))
        return [next(found) if whole else None for whole in finite.tolist()]

    def _refuse_probabilities(self, logits: torch.Tensor, error: type[Wn21kError]) -> None:
        """Refuse outputs that are a softmax's already, which would be read without an error, and wrongly."""
        import torch

        sums = logits.float().sum(dim=-1, keepdim=True)
        rounding = torch.finfo(logits.dtype).eps / 2 if logits.is_floating_point() else 0.0
        near = 0.01 if logits.numel() > 30 else 1e-5 + rounding  # a few logits are near 1 by chance
        if logits.shape[1] > 2 and len(logits) and bool(((logits >= 0) & ((sums - 1).abs() < near)).all()):
            raise error(
                f"The outputs of {self.name} are probabilities already: none is below 0, and each image's add up to 1. "
                "Give what comes before the softmax, or in float32 log(p + 1e-30)."
            )

    def _prediction(self, found: dict[str, Any] | None, source: str | None) -> Result:
        if found is None:
            return ModelError(
                f"{self.name} gives NaN or infinite outputs for {source or 'this image'}; check its weights."
            )
        return self._made(found, source)

    def _made(self, found: dict[str, Any], source: str | None) -> Prediction:
        return Prediction(
            source=source,
            model=self.name,
            label_space=self.label_space.name,
            head=self.head,
            tree=self._tree_name,
            threshold=self.threshold,
            **found,
        )


@overload
def predict(
    images: OneImage,
    model: ModelLike | None = None,
    top_k: int = 5,
    threshold: float = 0.5,
    device: str | torch.device = "auto",
    errors: Literal["raise"] = "raise",
    **options: Any,
) -> Prediction: ...
@overload
def predict(
    images: SeveralImages,
    model: ModelLike | None = None,
    top_k: int = 5,
    threshold: float = 0.5,
    device: str | torch.device = "auto",
    errors: Literal["raise"] = "raise",
    **options: Any,
) -> list[Prediction]: ...
@overload
def predict(
    images: ImageLike | Iterable[ImageLike],
    model: ModelLike | None = None,
    top_k: int = 5,
    threshold: float = 0.5,
    device: str | torch.device = "auto",
    errors: Errors = "raise",
    **options: Any,
) -> Any: ...
def predict(
    images: Any,
    model: ModelLike | None = None,
    top_k: int = 5,
    threshold: float = 0.5,
    device: str | torch.device = "auto",
    errors: Errors = "raise",
    **options: Any,
) -> Any:
    """Predict labels at every level of the hierarchy for one image or several.

    The last model of a record's or timm's name stays loaded for the next call; use a :class:`Predictor` for a folder,
    or to control this yourself.

    Args:
        images: One image or an iterable of them, as :func:`wn21k_zoo.images.load_image` takes them.
        model: As :class:`Predictor`.
        top_k: As :class:`Predictor`.
        threshold: As :class:`Predictor`.
        device: As :class:`Predictor`.
        errors: 'raise' the first error, or 'return' each in place of its prediction.
        **options: Further arguments of :class:`Predictor`.

    Returns:
        A :class:`Prediction` for one image, a list for several.

    Raises:
        Wn21kError: As :class:`Predictor`.
    """
    chosen: Any = models.choose_default(options.get("cache_dir")) if model is None else model
    if unknown := options.keys() - inspect.signature(Predictor).parameters:
        raise InvalidArgumentError(
            f"predict has no option {', '.join(sorted(unknown))}; help(wn21k_zoo.Predictor) lists them."
        )
    stays_the_same = isinstance(chosen, str) and registry.is_known(chosen)  # else a folder, or a repository
    if stays_the_same and not options.keys() & {"label_space", "head", "cache_dir"}:
        chosen = _load_once(chosen, str(select_device(device)))
    return Predictor(chosen, top_k=top_k, threshold=threshold, device=device, **options)(images, errors=errors)


@functools.lru_cache(maxsize=1)
def _load_once(name: str, device: str) -> LoadedModel:  # the device is part of the key: use on another one moves it
    return models.load_model(name)


def _is_several(images: Any) -> bool:
    if isinstance(images, Mapping):
        raise InvalidArgumentError(
            f"A {type(images).__name__} is not an image; give what it holds, such as row['image']."
        )
    dimensions = getattr(images, "ndim", None)
    if isinstance(dimensions, int):
        kind = getattr(getattr(images, "dtype", None), "kind", None)  # of a column of a table, or of an array
        return dimensions == 4 or (dimensions == 1 and (kind in ("O", "U", "S", "T") or not len(images)))
    single = isinstance(images, (str, bytes, bytearray, memoryview, os.PathLike)) or hasattr(images, "read")
    return not single and isinstance(images, Iterable) and not hasattr(images, "getbands")


def _loaded(image: ImageLike, *, allow_url: bool = False) -> Any:
    """Load an image; a warning that the caller turns into an error is an error of this image alone."""
    try:
        return load_image(image, allow_url=allow_url)
    except Warning as warning:
        raise ImageError(str(warning)) from warning


def _own_transform(model: LoadedModel) -> Callable[[Any], torch.Tensor]:
    if model.data_config is None:
        raise InvalidArgumentError(
            f"The preprocessing of {model.name} is not known; give transform (PIL image to tensor [3, H, W]), or the "
            "timm network that it wraps (module.module)."
        )
    if (channels := model.data_config["input_size"][0]) != 3:
        raise InvalidArgumentError(
            f"{model.name} takes images of {channels} channels; give transform, from an RGB PIL image to a tensor "
            f"[{channels}, H, W]."
        )
    return cast("Callable[[Any], torch.Tensor]", models.build_transform(model.data_config))
