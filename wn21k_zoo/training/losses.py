"""The losses of arXiv 2104.10972: semantic softmax, its distillation, and the paper's baselines.

All take logits of any floating-point dtype and reduce in float32; none loops over samples or waits for a device. On the
CPU, targets out of range and non-finite numbers raise an error at once. On other devices, where checking would mean
waiting, and in compiled code without the CPU's own operation they make the loss NaN, and :func:`explain` says why.

``reduction`` is that of torch's losses: with ``none`` a loss is [B], one number per sample, to be weighted or masked. A
target that does not count needs a valid class all the same; give its sample the weight 0, or leave out its row. Over an
empty batch a mean is 0, with gradients, so that a rank whose images are all damaged takes part in a step.

Shape suffixes: B batch, N classes, K levels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from wn21k_zoo.errors import InvalidArgumentError, NonFiniteError
from wn21k_zoo.training.levels import Levels, Order
from wn21k_zoo.tree import SemanticTree

__all__ = [
    "MultiLabelLoss",
    "Reduction",
    "SemanticDistillationLoss",
    "SemanticSoftmaxLoss",
    "SingleLabelLoss",
    "explain",
    "softmax_distance",
]

Reduction = Literal["mean", "sum", "none"]


class SemanticSoftmaxLoss(nn.Module):
    """Cross-entropy with label smoothing inside each level, summed over levels (arXiv 2104.10972, section 3.3).

    The loss of a sample is summed over the levels that its chain of ancestors reaches, each weighted by
    W_k = min(20, N / number of classes at depth k or deeper); the mean is over the whole batch.

    On the CPU it is a custom operator, which has only first derivatives; of ``torch.func`` it supports ``jvp`` alone,
    and that not when compiled. Elsewhere it consists of torch's own operators. Non-finite numbers are noticed where
    they count: in the levels that a sample of the batch reaches.

    Args:
        tree: The classes and their hierarchy.
        label_smoothing: Share of the target that is spread over the level's classes.
        order: Order of the logits, see :class:`Levels`; ``level`` is faster.
        reduction: ``mean``, ``sum`` or ``none``.

    Raises:
        InvalidArgumentError: label_smoothing is not in [0, 1), there is no such reduction, or the tree has no levels;
            from the call: shapes or targets that do not fit.
        NonFiniteError: From the call, on the CPU: the logits are not finite.
    """

    def __init__(
        self,
        tree: SemanticTree,
        label_smoothing: float = 0.2,
        order: Order = "published",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.levels, self.label_smoothing = Levels(tree, order), _smoothing(label_smoothing)
        self.levels.check_there_are_levels()
        self.reduction = _reduction(reduction)

    def extra_repr(self) -> str:
        """Return what printing the loss shows of it."""
        return _settings(self, "label_smoothing", "reduction")

    def forward(self, logits_bn: Tensor, targets_b: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            logits_bn: [B, N].
            targets_b: Indices in the tree's label space, whatever the order of the logits, [B] int64.

        Returns:
            float32: a scalar, or [B] without reduction.
        """
        levels = self.levels
        levels.check(logits_bn, targets_b)
        if logits_bn.device.type != "cpu" or not len(logits_bn) or _has_tangent(logits_bn):
            return self._plain(logits_bn, targets_b)
        targets_b, valid_b = levels.in_range(targets_b)
        loss_b: Tensor = _semantic_softmax(
            logits_bn,
            levels.ancestors.index_select(0, targets_b),
            levels.columns if levels.order == "published" else None,
            levels.positions if levels.order == "published" else None,
            [where.start for where in levels.slices],
            [where.stop for where in levels.slices],
            list(levels.weights),
            self.label_smoothing,
        )[0]
        return _reduced(loss_b.where(valid_b, math.nan), self.reduction)  # when compiled, the check looks at no values

    def _plain(self, logits_bn: Tensor, targets_b: Tensor) -> Tensor:
        """Compute the same with plain operations on fixed shapes, for other devices and compilers."""
        targets_b, valid_b = self.levels.in_range(targets_b)
        ancestors = self.levels.ancestors[targets_b]
        loss_b = logits_bn.new_zeros(len(logits_bn), dtype=torch.float32)
        for level, (scores, weight) in enumerate(zip(self.levels.split(logits_bn), self.levels.weights, strict=True)):
            of_level = F.cross_entropy(
                scores, ancestors[:, level], ignore_index=-1, reduction="none", label_smoothing=self.label_smoothing
            )
            loss_b = loss_b + weight * of_level
        return _reduced(loss_b.where(valid_b, math.nan), self.reduction)


@torch.library.custom_op("wn21k_zoo::semantic_softmax", mutates_args=())
def _semantic_softmax(
    logits: Tensor,
    ancestors: Tensor,
    columns: Tensor | None,
    positions: Tensor | None,
    starts: list[int],
    stops: list[int],
    weights: list[float],
    smoothing: float,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each sample, [B], and p minus its target, level by level, while a level is in the cache.

    Samples that do not reach a level cost nothing there.
    """
    if columns is not None:
        logits = logits.gather(1, columns.expand(len(logits), -1))
    errors = torch.empty(logits.numel(), dtype=torch.float32)
    loss_b = torch.zeros(len(logits), dtype=torch.float32)
    for level, rows, error in _reached(errors, ancestors, starts, stops):
        scores = logits[:, starts[level] : stops[level]].index_select(0, rows).float()
        at = ancestors[rows, level, None]
        p = torch.softmax(scores, 1, out=error)
        # The largest p is at least 1 / n, so its logarithm is exact even where that of the target's p is -inf.
        log_sum = scores.amax(1) - p.amax(1).log_()
        smoothed = (1 - smoothing) * scores.gather(1, at)[:, 0]
        if smoothing:  # without smoothing, classes may be masked by -inf
            smoothed += smoothing * scores.mean(1)
        loss_b.index_add_(0, rows, log_sum.sub_(smoothed), alpha=weights[level])
        if smoothing:
            p.sub_(smoothing / p.shape[1])
        p.scatter_add_(1, at, p.new_full(at.shape, smoothing - 1))
    if not math.isfinite(float(loss_b.sum())):
        raise NonFiniteError(_describe(logits))
    return loss_b, errors


@torch.library.custom_op("wn21k_zoo::semantic_softmax_backward", mutates_args=())
def _semantic_softmax_backward(
    gradient_b: Tensor,
    errors: Tensor,
    ancestors: Tensor,
    positions: Tensor | None,
    starts: list[int],
    stops: list[int],
    weights: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """Return the gradient with respect to the logits, [B, N]."""
    gradient = torch.zeros(len(ancestors), len(errors) // len(ancestors), dtype=torch.float32)
    of_all = bool((gradient_b == gradient_b[0]).all())  # as that of a mean or sum is
    scale = float(gradient_b[0]) if of_all else 1.0
    for level, rows, error in _reached(errors, ancestors, starts, stops):
        gradient[:, starts[level] : stops[level]].index_add_(0, rows, error, alpha=scale * weights[level])
    if not of_all:
        gradient.mul_(gradient_b[:, None])
    gradient = gradient if positions is None else gradient.gather(1, positions.expand(len(gradient), -1))
    return gradient.to(dtype)


def _reached(
    errors: Tensor, ancestors: Tensor, starts: list[int], stops: list[int]
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each level that any sample reaches, the rows of those samples, and their errors, [rows, classes]."""
    begin = 0
    for level, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        rows = (ancestors[:, level] >= 0).nonzero()[:, 0]
        if len(rows):
            end = begin + len(rows) * (stop - start)
            yield level, rows, errors[begin:end].view(len(rows), -1)
            begin = end


@_semantic_softmax.register_fake
def _(logits, ancestors, columns, positions, starts, stops, weights, smoothing):  # type: ignore[no-untyped-def]
    del ancestors, columns, positions, starts, stops, weights, smoothing
    return logits.new_empty(len(logits), dtype=torch.float32), logits.new_empty(logits.numel(), dtype=torch.float32)


@_semantic_softmax_backward.register_fake
def _(gradient_b, errors, ancestors, positions, starts, stops, weights, dtype):  # type: ignore[no-untyped-def]
    del gradient_b, positions, starts, stops, weights
    return errors.new_empty((len(ancestors), len(errors) // len(ancestors)), dtype=dtype)


def _keep_errors(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    logits, ancestors, _, positions, *ctx.levels, _ = inputs
    ctx.dtype = logits.dtype
    ctx.set_materialize_grads(False)  # the errors get no gradient, and zeros would be as large as the logits
    ctx.save_for_backward(output[1], ancestors, positions)


def _gradient(ctx, gradient_b: Tensor | None, _: Tensor | None):  # type: ignore[no-untyped-def]
    if gradient_b is None:
        return (None,) * 8
    gradient = _semantic_softmax_backward(gradient_b, *ctx.saved_tensors, *ctx.levels, ctx.dtype)
    return gradient, None, None, None, None, None, None, None


_semantic_softmax.register_autograd(_gradient, setup_context=_keep_errors)


class SemanticDistillationLoss(nn.Module):
    """Distance of a student's per-level softmax from the teacher's (arXiv 2104.10972, section 3.4).

    Per level: the squared difference, weighted per sample by the teacher's probability in its top 5 % (rounded up) of
    the level's classes; summed over classes, levels and, as in the published code, the batch, unless ``reduction`` says
    otherwise. Its weight relative to the other loss is not published.

    Args:
        tree: The classes and their hierarchy.
        order: Order of both networks' logits, see :class:`Levels`.
        per_level: Use a softmax per level, or else one over all classes, to distil a single-label network.
        reduction: ``sum``, ``mean`` or ``none``.

    Raises:
        InvalidArgumentError: There is no such reduction, or the tree has no levels; from the call: shapes that do not
            fit.
        NonFiniteError: From the call, on the CPU: logits are not finite.
    """

    def __init__(
        self,
        tree: SemanticTree,
        order: Order = "published",
        per_level: bool = True,
        reduction: Reduction = "sum",
    ) -> None:
        super().__init__()
        self.levels, self.per_level, self.reduction = Levels(tree, order), per_level, _reduction(reduction)
        if per_level:
            self.levels.check_there_are_levels()

    def extra_repr(self) -> str:
        """Return what printing the loss shows of it."""
        return _settings(self, "per_level", "reduction")

    def forward(self, student_bn: Tensor, teacher_bn: Tensor) -> Tensor:
        """Return the loss of a batch.

        Args:
            student_bn: Logits, [B, N].
            teacher_bn: Logits, [B, N]; they get no gradient.

        Returns:
            float32: a scalar, or [B] without reduction.
        """
        self.levels.check_width(student_bn, "the student's logits")
        self.levels.check_width(teacher_bn, "the teacher's logits")
        if len(student_bn) != len(teacher_bn):
            raise InvalidArgumentError(
                f"The student's logits have {len(student_bn)} rows, but the teacher's have {len(teacher_bn)}."
            )
        loss_b = student_bn.new_zeros(len(student_bn), dtype=torch.float32)
        parts = self.levels.split if self.per_level else lambda logits_bn: [logits_bn.float()]
        for ours, theirs in zip(parts(student_bn), parts(teacher_bn.detach()), strict=True):
            loss_b = loss_b + softmax_distance(ours, theirs)
        _check_finite(loss_b, student_bn, teacher_bn)
        return _reduced(loss_b, self.reduction)


def softmax_distance(student_bn: Tensor, teacher_bn: Tensor) -> Tensor:
    """One level of :class:`SemanticDistillationLoss`: float32 logits, [B, N], to a loss per sample, [B]."""
    teacher_bn = teacher_bn.softmax(1)
    certainty_b = teacher_bn.topk(-(-teacher_bn.shape[1] // 20), sorted=False).values.sum(1)
    return (student_bn.softmax(1) - teacher_bn).square().sum(1) * certainty_b


class SingleLabelLoss(nn.Module):
    """The paper's first baseline: one softmax over all classes, cross-entropy with label smoothing.

    Args:
        tree: The classes.
        label_smoothing: Share of the target that is spread over all classes.
        order: Order of the logits, see :class:`Levels`.
        reduction: ``mean``, ``sum`` or ``none``.

    Raises:
        InvalidArgumentError: As :class:`SemanticSoftmaxLoss`, but the tree needs no levels.
        NonFiniteError: As :class:`SemanticSoftmaxLoss`.
    """

    def __init__(
        self,
        tree: SemanticTree,
        label_smoothing: float = 0.2,
        order: Order = "published",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        self.levels, self.label_smoothing = Levels(tree, order), _smoothing(label_smoothing)
        self.reduction = _reduction(reduction)

    def extra_repr(self) -> str:
        """Return what printing the loss shows of it."""
        return _settings(self, "label_smoothing", "reduction")

    def forward(self, logits_bn: Tensor, targets_b: Tensor) -> Tensor:
        """Return the loss, float32, [B] or reduced, of logits [B, N] and indices in the label space, [B] int64."""
        self.levels.check(logits_bn, targets_b)
        targets_b, valid_b = self.levels.in_range(targets_b)
        if self.levels.order == "level":
            targets_b = self.levels.positions[targets_b]
        loss_b = F.cross_entropy(logits_bn.float(), targets_b, reduction="none", label_smoothing=self.label_smoothing)
        _check_finite(loss_b, logits_bn)
        return _reduced(loss_b.where(valid_b, math.nan), self.reduction)


class MultiLabelLoss(nn.Module):
    """The paper's second baseline: a sigmoid per class, true for a class and all its ancestors.

    The asymmetric loss is that of arXiv 2009.14119, equation 7: negatives with p below ``clip`` do not count, and the
    exponents down-weight easy ones. Summed over classes, mean over the batch. Its gradient is the full one; some
    training code treats the weights of that equation as constants.

    Args:
        tree: The classes and their hierarchy.
        gamma_negative: Exponent for negative classes; 4 in that paper.
        gamma_positive: Exponent for positive classes; 0 in that paper.
        clip: Probability margin of negatives; 0.05 in that paper.
        order: Order of the logits, see :class:`Levels`.
        reduction: ``mean``, ``sum`` or ``none``.

    Raises:
        InvalidArgumentError: As :class:`SemanticSoftmaxLoss`, but the tree needs no levels.
        NonFiniteError: As :class:`SemanticSoftmaxLoss`, where the loss is not finite; for a negative class the clip
            bounds it, so an infinite logit counts like a large one.
    """

    chains: Tensor

    def __init__(
        self,
        tree: SemanticTree,
        gamma_negative: float = 4.0,
        gamma_positive: float = 0.0,
        clip: float = 0.05,
        order: Order = "published",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        if gamma_negative < 0 or gamma_positive < 0 or not 0 <= clip < 1:
            raise InvalidArgumentError("The exponents of MultiLabelLoss must be at least 0, its clip in [0, 1).")
        self.levels = Levels(tree, order)
        self.register_buffer("chains", _chains(self.levels), persistent=False)
        self.gamma_negative, self.gamma_positive, self.clip = gamma_negative, gamma_positive, clip
        self.reduction = _reduction(reduction)

    def extra_repr(self) -> str:
        """Return what printing the loss shows of it."""
        return _settings(self, "gamma_negative", "gamma_positive", "clip", "reduction")

    def forward(self, logits_bn: Tensor, targets_b: Tensor) -> Tensor:
        """Return the loss, float32, [B] or reduced, of logits [B, N] and indices in the label space, [B] int64."""
        self.levels.check(logits_bn, targets_b)
        targets_b, valid_b = self.levels.in_range(targets_b)
        truth = self._truth(targets_b)
        logits_bn = logits_bn.float()
        p = logits_bn.sigmoid()
        false = (1 - p + self.clip).clamp(max=1)
        # Without a clip the probability would round to 0 long before its logarithm is large.
        log_true = F.logsigmoid(logits_bn)
        log_false = false.log() if self.clip else F.logsigmoid(-logits_bn)
        # Exponents below 1 have no gradient at 0.
        positive = log_true * (1 - p).clamp(min=1e-8).pow(self.gamma_positive)
        negative = log_false * (1 - false).clamp(min=1e-8).pow(self.gamma_negative)
        loss_b = -torch.where(truth, positive, negative).sum(1)
        _check_finite(loss_b, logits_bn)
        return _reduced(loss_b.where(valid_b, math.nan), self.reduction)

    def _truth(self, targets_b: Tensor) -> Tensor:
        """For each sample and output, whether the output is the class or one of its ancestors, [B, N] bool."""
        truth = torch.zeros(len(targets_b), self.levels.num_classes + 1, dtype=torch.bool, device=targets_b.device)
        return truth.scatter_(1, self.chains[targets_b], True)[:, :-1]


def _chains(levels: Levels) -> Tensor:
    """Positions of the outputs of each class and its ancestors, padded with N, [N, longest] int64.

    Covers all depths, including those with one class, which have no softmax of their own.
    """
    table = torch.from_numpy(levels.tree.ancestor_table.copy())
    places = levels.positions if levels.order == "level" else torch.arange(levels.num_classes)
    return places[table].where(table >= 0, levels.num_classes)


def explain(levels: Levels | None, logits_bn: Tensor, targets_b: Tensor) -> str:
    """Say why a loss is not finite, for devices on which the loss itself does not check; waits for the device.

    ``levels`` is None for classes without a tree.

    Raises:
        InvalidArgumentError: A target is out of range.
    """
    if levels is not None:
        levels.check_range(targets_b)
    return _describe(logits_bn)


def _has_tangent(tensor: Tensor) -> bool:
    """Whether a forward-mode derivative is wanted, which a custom operator would silently leave out."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def _smoothing(value: float) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise InvalidArgumentError(f"label_smoothing must be in [0, 1), not {value!r}.")
    return float(value)


def _settings(loss: nn.Module, *names: str) -> str:
    return ", ".join(f"{name}={getattr(loss, name)!r}" for name in names)


def _reduction(name: str) -> Reduction:
    if name not in get_args(Reduction):
        raise InvalidArgumentError(f"reduction is {name!r}; it can be {', '.join(get_args(Reduction))}.")
    return cast(Reduction, name)


def _reduced(loss_b: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return loss_b
    total = loss_b.sum()
    return total / max(1, len(loss_b)) if reduction == "mean" else total


def _check_finite(loss_b: Tensor, *logits: Tensor) -> None:
    on_cpu = loss_b.device.type == "cpu" and not torch.compiler.is_compiling()
    if on_cpu and not math.isfinite(float(loss_b.detach().sum())):
        raise NonFiniteError(_describe(*logits))


def _describe(*logits: Tensor) -> str:
    bad = [~torch.isfinite(each) for each in logits]
    rows = sum(int(each.any(1).sum()) for each in bad)
    if not rows:
        return "The loss is not finite although all logits are; they are too large for float32."
    return (
        f"{sum(int(each.sum()) for each in bad):,} logits in {rows} of {len(bad[0])} rows are NaN or infinite; a lower "
        "learning rate, clipping or bf16 in place of fp16 may help."
    )
