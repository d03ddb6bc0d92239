"""What a run changes step by step: a network with its optimizer, schedule and moving average."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from wn21k_zoo.errors import BadImagesError, NonFiniteError, RecipeError, RunError, is_out_of_memory
from wn21k_zoo.labels import ClassNames
from wn21k_zoo.running import memory_format
from wn21k_zoo.training.data import Batch
from wn21k_zoo.training.dataset import images_per_class
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.failures import not_deterministic
from wn21k_zoo.training.heads import freeze_backbone, train_head
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.losses import explain
from wn21k_zoo.training.mixing import mix
from wn21k_zoo.training.network import Normalized, build_network, try_size
from wn21k_zoo.training.optimization import Criterion, average_of, build_optimizer, build_schedule
from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.training.splits import Splits
from wn21k_zoo.training.teacher import build_teacher, check_teacher

__all__ = ["Learner"]

_SMALLEST_SCALE = 2.0**-20  # 36 steps after the first, which has 2 ** 16, if all of them overflowed
_OF_DEVICE = ("foreach", "fused")  # how an optimizer computes, not what it computes
_ONE_VALUE = "more than 1 value per channel"  # torch's message
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Learner:
    """Computes losses and gradients, and updates the weights.

    A step is :meth:`begin`, then, for each part of its batch within :meth:`gathering`, :meth:`loss` and
    :meth:`backward`, then :meth:`update`.

    Args:
        recipe: What to build.
        splits: The data, which gives the classes.
        world: The processes that train together.
        steps: Steps of the whole run.
        begun: Whether the run resumes from a checkpoint, so that its starting weights are not needed.

    Attributes:
        module: The network as it is saved.
        network: The same network as it computes: compiled, and with gradients reduced over ranks.
        levels: The tree's levels, in the order of the network's outputs; None without a tree.
        about_teacher: What to tell the user about the teacher; may be empty.
        teacher_digest: Digest of everything that decides the teacher's outputs; empty without a teacher.
        whole: Whether weights and optimizer are those after a whole step; the caller sets it to False around
            :meth:`update`.

    Raises:
        RecipeError, ModelError: Something does not fit.
        RunError: There is not enough memory for the network.
    """

    def __init__(self, recipe: Recipe, splits: Splits, world: World, steps: int, begun: bool = False) -> None:
        self._recipe, self._world, self._device = recipe, world, world.device
        self.levels = Levels(splits.tree, "level").to(world.device) if splits.tree is not None else None
        if self.levels is not None and recipe.loss.kind == "semantic_softmax":
            check_levels(self.levels)
        self.whole, self.about_teacher, self.teacher_digest = True, "", ""
        self._within = False  # a step, at whose beginning the batch statistics were saved
        self._there: torch.cuda.Event | None = None
        self._stream = torch.cuda.Stream(world.device) if world.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        try:
            self._build(splits, steps, begun)
        except RuntimeError as error:  # _settle runs a backward pass
            if is_out_of_memory(error):
                raise RunError(
                    f"The memory of {world.device} is not enough for the network itself: check whether other processes "
                    "use it, or choose a smaller model.architecture."
                ) from error
            if (known := not_deterministic(error)) is not None:
                raise known from error
            raise

    def _build(self, splits: Splits, steps: int, begun: bool) -> None:
        recipe = self._recipe
        check_teacher(recipe)
        network = build_network(recipe, splits.class_names, self.levels, pretrained=not begun)
        if recipe.model.freeze_backbone:
            freeze_backbone(network)
        self._infinite = {name for name, buffer in network.named_buffers() if _has_bounds(buffer)}
        self.module = Normalized(network, recipe.model.mean, recipe.model.std).to(self._device)
        self._format = memory_format(self._device, recipe.model.channels_last)
        self.module.to(memory_format=self._format)
        if recipe.model.sync_batchnorm and self._world.size > 1:
            if self._device.type != "cuda":
                raise RecipeError("model.sync_batchnorm needs GPUs; set it to false.")
            from timm.layers import convert_sync_batchnorm  # keeps the activations that timm's layers contain

            self.module = cast(Normalized, convert_sync_batchnorm(self.module))
        self._teacher: nn.Module | None = None
        if recipe.loss.teacher is not None:
            classes = splits.space or ClassNames(splits.class_names)
            made = build_teacher(recipe, classes, self.levels, self._device)
            self._teacher, self.about_teacher, self.teacher_digest = made
            self._teacher.to(memory_format=self._format)
        for field, each in (("The network", self.module), ("loss.teacher", self._teacher)):
            if each is not None:
                try_size(each, recipe.data.size, self._device, field, len(splits.class_names))
        self._buffers = dict(self.module.module.named_buffers())
        self._kept = {name: buffer.clone() for name, buffer in self._buffers.items()}
        images = images_per_class(splits.train) if recipe.loss.logit_adjustment else None
        self.criterion = Criterion(recipe, splits.tree, images).to(self._device)
        self.optimizer = build_optimizer(recipe, self.module.module)
        self._factor: float = self.optimizer.param_groups[0]["lr"] / recipe.optimizer.lr
        self._schedule = build_schedule(recipe, self.optimizer, steps)
        self.scaler = torch.amp.GradScaler(self._device.type, enabled=recipe.run.precision == "fp16")
        decay = recipe.run.ema_decay
        self._average = average_of(self.module, decay) if decay else None
        wrapped: nn.Module = self.module
        if self._world.size > 1:
            ids = [self._device.index] if self._device.type == "cuda" else None
            # Gradients are views of the buckets that are reduced over ranks; second copies only with accumulation.
            wrapped = DistributedDataParallel(self.module, device_ids=ids, gradient_as_bucket_view=True)
            # Nothing reads batch statistics in training; those saved and evaluated are the first rank's.
            wrapped.broadcast_buffers = False
            _settle(wrapped, recipe.data.size, self._device)
        self.network = wrapped.eval()  # until _train
        self._try_alone()
        if recipe.model.compile:
            self.network = cast(nn.Module, torch.compile(wrapped))
            for loss in (self.criterion.loss, self.criterion.distillation):
                if loss is not None:
                    loss.compile()

    def _try_alone(self) -> None:
        """Check that batch statistics need no more than one image, where images go through the network one at a time.

        Raises:
            RecipeError: They do.
        """
        if self._recipe.micro_batches(self._world.size)[0] > 1:
            return
        size, before = self._recipe.data.size, {name: each.clone() for name, each in self._buffers.items()}
        self._train()
        try:
            with torch.no_grad():
                self.module(self.laid_out(torch.zeros(1, 3, size, size, device=self._device)))
        except ValueError as error:
            if _ONE_VALUE not in str(error):
                raise
            message = f"One image alone cannot train batch normalisation: raise {self._recipe.bound}."
            raise RecipeError(message) from error
        finally:
            _copy(self._buffers, before)

    @property
    def rate(self) -> float:
        """The learning rate of the next step, before the classifier and layer factors."""
        return float(self.optimizer.param_groups[0]["lr"]) / self._factor

    def begin(self) -> None:
        """Begin a step; the leading rank saves the batch statistics from before it, as the step changes them."""
        self._train()
        if self._world.leads:
            _copy(self._kept, self._buffers)
        self._within = True
        self._mark()

    def _train(self) -> None:
        """Put the network, or the part of it that is trained, in training mode, after what put it into the other."""
        if self.module.training:  # going through all its parts takes milliseconds
            return
        self.network.train()
        if self._recipe.model.freeze_backbone:
            train_head(self.module.module)

    def _mark(self) -> None:
        """Record that what a checkpoint holds is ready once the GPU has done all work queued so far."""
        if self._device.type == "cuda":
            self._there = torch.cuda.current_stream(self._device).record_event()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Within the block, read what a checkpoint holds without waiting for the GPU's current step.

        That step may wait for a rank that never arrives. If that rank was lost during a backward pass, the weights
        after it never become available, and reading them waits as well.
        """
        if self._there is None or self._stream is None:
            yield
            return
        self._stream.wait_event(self._there)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def gathering(self, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Wrap the passes of one part of a step's batch; only with the last part are gradients reduced over ranks."""
        if last or self._world.size == 1:
            return contextlib.nullcontext()
        return cast(contextlib.AbstractContextManager[Any], cast(Any, self.network).no_sync())

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Within the block, compute in the recipe's precision."""
        dtype = _DTYPES.get(self._recipe.run.precision)
        return torch.autocast(self._device.type, dtype) if dtype is not None else contextlib.nullcontext()

    def laid_out(self, images: Tensor) -> Tensor:
        """Return images [B, 3, height, width] in the memory format of the network's weights."""
        return images.contiguous(memory_format=self._format)

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar; NaN where it cannot be computed.

        It is 0 for a batch without images, or with only one left of several where batch statistics need two.

        Raises:
            BadImagesError: The loss would be 0, but other ranks wait for batch statistics of these images.
        """
        if not len(batch):
            return self._nothing()
        self._train()  # after a batch without images
        data = self._recipe.data
        images, share = mix(batch.images, data.mixup, data.cutmix)
        images = self.laid_out(images)
        before = {name: each.clone() for name, each in self._buffers.items()} if len(batch) == 1 else {}
        with self.autocast():
            with torch.no_grad():
                teacher = self._teacher(images) if self._teacher is not None else None
            try:
                logits = self.network(images)
            except Exception as error:  # torch.compile raises a type of its own
                if _ONE_VALUE not in str(error):
                    raise
                _copy(self._buffers, before)  # earlier layers may have counted the image; the others are damaged
                return self._nothing()
        loss: Tensor = self.criterion(logits, batch.targets, teacher, share)
        self._last = loss.detach(), logits.detach(), batch.targets
        return loss

    def _nothing(self) -> Tensor:
        """Return a zero loss that changes nothing but has a backward pass, where ranks wait for each other.

        Raises:
            BadImagesError: Other ranks wait for batch statistics, and this rank has none.
        """
        model = self._recipe.model
        if model.sync_batchnorm and not model.freeze_backbone and self._world.size > 1:
            raise BadImagesError(
                "All images of a batch are damaged, and model.sync_batchnorm needs at least one: raise "
                "data.batch_per_device and resume the run, or remove the images named above and start a new one."
            )
        size = self._recipe.data.size
        # In evaluation mode until after the backward pass, where gradient checkpointing computes this again.
        logits = self.network.eval()(torch.zeros(1, 3, size, size, device=self._device))
        self._last = logits.detach().sum() * 0, logits.detach(), torch.zeros(1, dtype=torch.int64, device=logits.device)
        return cast(Tensor, logits.sum() * 0)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a loss to those so far."""
        scaled = self.scaler.scale(loss)
        if not self._recipe.model.gradient_checkpointing:
            scaled.backward()  # type: ignore[no-untyped-call]
            return
        # Recomputed activations must not update the batch statistics a second time.
        counted = {name: buffer.clone() for name, buffer in self._buffers.items()}
        scaled.backward()  # type: ignore[no-untyped-call]
        _copy(self._buffers, counted)

    def update(self) -> None:
        """Update the weights; the caller sets ``whole`` once the whole step is counted."""
        if self._recipe.optimizer.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.module.parameters(), self._recipe.optimizer.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # The schedule counts steps, even where an overflow in fp16 made the scaler skip the first update.
        first = self._schedule.last_epoch == 0
        with warnings.catch_warnings(action="ignore", category=UserWarning) if first else contextlib.nullcontext():
            self._schedule.step()
        if self._average is not None:
            self._average.update(self.module, self._schedule.last_epoch)  # the first update copies
            if self._infinite:  # of which an average would be NaN
                averaged = self._average.module.module.get_buffer
                _copy({name: averaged(name) for name in self._infinite}, self._buffers)
        self._within = False
        self._mark()

    def why_not_finite(self) -> str:
        """Say why the last loss is not finite; see :func:`explain`."""
        loss, logits, targets = self._last
        if math.isfinite(loss):
            return "on another rank, or in an earlier part of the batch; the loss of the last part is finite here."
        return explain(self.levels, logits, targets)

    def check_scale(self) -> None:
        """Check that fp16 gradients do not always overflow; waits for the device.

        Raises:
            NonFiniteError: They overflowed again and again, so that no step changed anything.
        """
        if self.scaler.is_enabled() and self.scaler.get_scale() < _SMALLEST_SCALE:
            raise NonFiniteError(
                "The gradients are not finite in fp16, however small the loss is scaled; set run.precision to bf16 or "
                "fp32."
            )

    def subject(self) -> nn.Module:
        """Return the network to evaluate, the same on all ranks: the moving average where there is one."""
        module = (self._average.module if self._average is not None else self.module).eval()
        if self._world.size > 1:
            for buffer in module.buffers():  # each rank's batch statistics are its own
                torch.distributed.broadcast(buffer, 0)
        return module

    def state_dict(self) -> dict[str, Any]:
        """Return the state after the last whole step, on the leading rank.

        Within a step the weights stay those from before it until :meth:`update`; the batch statistics are the ones
        that :meth:`begin` saved.
        """
        model, kept = self.module.module.state_dict(), self._kept if self._within else {}
        return {
            "model": {name: kept.get(name, value) for name, value in model.items()},
            "average": self._average.state_dict() if self._average is not None else None,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def is_finite(self, state: Mapping[str, Any]) -> bool:
        """Whether all weights, batch statistics and averages in a state are, but for bounds that begin infinite."""
        by_design = self._infinite | {f"module.module.{name}" for name in self._infinite}
        named = [*state["model"].items(), *(state["average"] or {}).items()]
        checked = [each.detach() for name, each in named if each.is_floating_point() and name not in by_design]
        return bool(get_total_norm(checked, math.inf).isfinite())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned."""
        self.module.module.load_state_dict(state["model"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        for saved, own in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True):
            saved.update({key: own[key] for key in _OF_DEVICE if key in own})
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, own in self.optimizer.state.items():
            for name, value in own.items():  # in the weight's memory layout, which may differ between devices
                if value.dim() and value.shape == weight.shape and value.stride() != weight.stride():
                    own[name] = torch.empty_like(weight, dtype=value.dtype).copy_(value)
        self._schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])


def check_levels(levels: Levels) -> None:
    """Check that a softmax per level differs from a softmax over all classes.

    Raises:
        RecipeError: It does not.
    """
    if not levels.depths:
        raise RecipeError(
            "The classes form a single chain, so no level has two to choose between; set loss.kind to single_label."
        )
    if not levels.tree.depths.any():
        raise RecipeError(
            "No class is an ancestor of another, so semantic_softmax is one softmax over all of them: set loss.kind to "
            "single_label, or data.label_space to classes that have ancestors among them."
        )


def _has_bounds(buffer: Tensor) -> bool:
    """Whether a buffer is infinite by design."""
    return bool(buffer.isinf().any()) and not bool(buffer.isnan().any())


def _copy(targets: dict[str, Tensor], sources: dict[str, Tensor]) -> None:
    """Copy tensors into those of the same names, with one call per dtype."""
    for dtype in {each.dtype for each in targets.values()}:
        names = [name for name, each in targets.items() if each.dtype == dtype]
        torch._foreach_copy_([targets[name] for name in names], [sources[name] for name in names])


def _settle(network: DistributedDataParallel, size: int, device: torch.device) -> None:
    """Run the backward pass by which DDP chooses what ranks reduce together, and in which order.

    Otherwise the first step after a resume would do so too, and reduce in another order than in an uninterrupted run:
    to different bits with three or more ranks. Changes no weights and no statistics.
    """
    with warnings.catch_warnings():
        # Given for parameters such as a class token; DDP then copies their gradients, which are small.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        network.eval()(torch.zeros(1, 3, size, size, device=device)).sum().backward()
    network.zero_grad(set_to_none=True)
