import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.training.published_losses import CLOSE, LOSSES, ORDERS, WAYS, loss_values
from wn21k_zoo.errors import InvalidArgumentError, NonFiniteError
from wn21k_zoo.training import losses
from wn21k_zoo.training.levels import Levels
from wn21k_zoo.training.losses import (
    MultiLabelLoss,
    SemanticDistillationLoss,
    SemanticSoftmaxLoss,
    SingleLabelLoss,
    explain,
)
from wn21k_zoo.training.metrics import SemanticAccuracy
from wn21k_zoo.tree import SemanticTree

# Three depths, the last with one class; three roots, two of them without children.
SMALL = SemanticTree.from_wnids(
    ["n02121808", "n02084071", "n01861778", "n02123045", "n00017222", "n00007846"], name="small"
)


def in_order(levels, logits):
    return logits if levels.order == "published" else logits[:, levels.columns]


def published(levels, logits):
    return logits if levels.order == "published" else logits[:, levels.positions]


@pytest.mark.parametrize("case", sorted(LOSSES))
def test_levels_are_the_published_ones(case):
    expected, levels = LOSSES[case], Levels(SemanticTree.load(case))
    assert [where.stop - where.start for where in levels.slices] == expected["level_sizes"]
    assert len(levels.depths) == expected["num_levels"]
    np.testing.assert_allclose(levels.weights, expected["normalization"][: len(levels.depths)])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", sorted(LOSSES))
def test_losses_and_metric_are_the_published_ones(case, order, way, device):
    # Published positions count the classes of a level in class-list order, which is sorted by wnid.
    for quantity, value in loss_values(case, order, way, device).items():
        torch.testing.assert_close(
            value, LOSSES[case][quantity], **CLOSE, msg=lambda text, of=quantity: f"{of}: {text}"
        )


def test_distillation_of_one_softmax_over_all_classes():
    student, teacher = torch.randn(3, 6), torch.randn(3, 6)
    ours, theirs = student.softmax(1), teacher.softmax(1)
    certainty = theirs.max(1).values  # 5 % of six classes, rounded up
    expected = (((ours - theirs) ** 2).sum(1) * certainty).sum()
    for order in ORDERS:
        torch.testing.assert_close(SemanticDistillationLoss(SMALL, order, per_level=False)(student, teacher), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_with_one_level_it_is_plain_cross_entropy(smoothing):
    tree = SemanticTree.load("imagenet1k")
    logits, targets = torch.randn(9, len(tree)).requires_grad_(), torch.randint(0, len(tree), (9,))
    loss = SemanticSoftmaxLoss(tree, smoothing)(logits, targets)
    expected = F.cross_entropy(logits, targets, label_smoothing=smoothing)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (loss, expected)))


@settings(deadline=None, max_examples=60)
@given(
    targets=st.lists(st.integers(0, len(SMALL) - 1), min_size=1, max_size=9),
    smoothing=st.sampled_from([0.0, 0.1, 0.5]),
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.1, 1.0, 30.0, 500.0]),
    order=st.sampled_from(ORDERS),
)
@example(targets=[0, 0], smoothing=0.0, seed=4932, scale=500.0, order="level")
def test_both_ways_to_compute_it_agree_with_the_definition(targets, smoothing, seed, scale, order):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(targets), len(SMALL), generator=generator) * scale).requires_grad_()
    loss_of = SemanticSoftmaxLoss(SMALL, smoothing, order)
    levels = loss_of.levels
    exact, expected = logits.detach().double().requires_grad_(), torch.zeros((), dtype=torch.float64)
    for row, target in zip(published(levels, exact), targets, strict=True):
        for depth in {SMALL.depths[index] for index in SMALL.class_tree_list[target]}:
            members = np.flatnonzero(SMALL.depths == depth)
            if len(members) < 2:
                continue
            (ancestor,) = (index for index in SMALL.class_tree_list[target] if SMALL.depths[index] == depth)
            wanted = torch.full((len(members),), smoothing / len(members), dtype=torch.float64)
            wanted[int(np.flatnonzero(members == ancestor)[0])] += 1 - smoothing
            weight = min(20, len(SMALL) / int((SMALL.depths >= depth).sum()))
            expected = expected - weight * (wanted * row[members].log_softmax(0)).sum() / len(targets)
    expected_gradient = torch.autograd.grad(expected, exact)[0].float()
    # torch's logsumexp, used by the plain operations, rounds a probability relative to the size of its logit.
    rounding = torch.finfo(torch.float32).eps * float(logits.detach().abs().max())
    for path, atol in ((loss_of, 1e-6), (loss_of._plain, 1e-6 + rounding)):
        loss = path(logits, torch.tensor(targets))
        torch.testing.assert_close(loss, expected.detach().float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected_gradient, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("order", ORDERS)
def test_half_precision_is_reduced_in_float32(dtype, order):
    tree = SemanticTree.load("winter21")
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(16, len(tree), generator=generator) * 8).to(dtype)
    targets, teacher = torch.arange(16) * 600, torch.randn(16, len(tree), generator=generator)
    semantic, distillation = SemanticSoftmaxLoss(tree, 0.2, order), SemanticDistillationLoss(tree, order)
    half, single = logits.clone().requires_grad_(), logits.float().requires_grad_()
    others = SingleLabelLoss(tree, order=order), MultiLabelLoss(tree, order=order)
    for loss_of, other in ((semantic, targets), (distillation, teacher), *((each, targets) for each in others)):
        loss, expected = loss_of(half, other), loss_of(single, other)
        assert loss.dtype is torch.float32
        torch.testing.assert_close(loss, expected)
        (gradient,) = torch.autograd.grad(loss, half)
        assert gradient.dtype is dtype
        torch.testing.assert_close(gradient, torch.autograd.grad(expected, single)[0].to(dtype))


# Most depths of the second tree have one class, an ancestor of all others.
@pytest.mark.parametrize(
    "tree", [SMALL, SemanticTree.from_wnids(["n02121808", "n02123045", "n02084071"]).with_ancestors()]
)
@pytest.mark.parametrize("order", ORDERS)
def test_multi_label_is_the_asymmetric_loss_over_a_class_and_its_ancestors(order, tree):
    loss_of = MultiLabelLoss(tree, gamma_negative=3, gamma_positive=1, clip=0.1, order=order)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(len(tree), len(tree), generator=generator) * 3
    expected = 0.0
    for target, row in enumerate(logits.sigmoid().tolist()):
        for index, p in enumerate(row):
            if index in tree.class_tree_list[target]:
                expected -= (1 - p) * math.log(p)
            elif p > 0.1:
                expected -= (p - 0.1) ** 3 * math.log(1 - p + 0.1)
    loss = loss_of(in_order(loss_of.levels, logits), torch.arange(len(tree)))
    torch.testing.assert_close(loss.item(), expected / len(tree), rtol=1e-5, atol=1e-5)


def test_multi_label_without_exponents_is_binary_cross_entropy():
    tree = SemanticTree.load("winter21")
    logits, targets = torch.randn(4, len(tree)), torch.tensor([0, 500, 5000, len(tree) - 1])
    truth = torch.zeros(4, len(tree))
    for row, target in zip(truth, targets.tolist(), strict=True):
        row[tree.class_tree_list[target]] = 1
    loss_of = MultiLabelLoss(tree, gamma_negative=0, gamma_positive=0, clip=0)
    for scale in (1, 60):
        loss = loss_of(logits * scale, targets)
        expected = F.binary_cross_entropy_with_logits(logits * scale, truth, reduction="sum") / 4
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 4.0])
def test_multi_label_has_a_gradient_everywhere(gamma):
    logits = (torch.linspace(-60, 60, 36).view(6, 6)).requires_grad_()
    loss = MultiLabelLoss(SMALL, gamma_negative=gamma, gamma_positive=gamma)(logits, torch.arange(6))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("loss_class", [SemanticSoftmaxLoss, SingleLabelLoss, MultiLabelLoss])
def test_input_that_does_not_fit_is_a_typed_error(loss_class):
    loss_of = loss_class(SMALL)
    logits, targets = torch.zeros(3, len(SMALL)), torch.tensor([0, 1, 2])
    for bad_logits in (torch.zeros(3, len(SMALL) + 1), torch.zeros(len(SMALL)), torch.zeros(3, 6, 4, 4)):
        with pytest.raises(InvalidArgumentError, match=r"logits must have the shape \[batch, 6\]"):
            loss_of(bad_logits, targets)
    for bad_targets in (targets[:2], targets.int(), targets.float(), targets[:, None]):
        with pytest.raises(InvalidArgumentError, match=r"targets must be class indices.*(?<!shares)\.$"):
            loss_of(logits, bad_targets)
    for value in (-1, len(SMALL)):
        with pytest.raises(InvalidArgumentError, match=f"A target is {value}, but small has the classes 0 to 5"):
            loss_of(logits, torch.tensor([0, value, 1]))
    for value in (math.nan, math.inf)[: 1 if loss_class is MultiLabelLoss else 2]:  # a sigmoid is finite
        broken = logits.clone()
        broken[1, 0] = value
        with pytest.raises(NonFiniteError, match="1 logits in 1 of 3 rows are NaN or infinite"):
            loss_of(broken, targets)


def test_distillation_of_what_does_not_fit_is_a_typed_error():
    loss_of = SemanticDistillationLoss(SMALL)
    with pytest.raises(InvalidArgumentError, match="the teacher's logits must have the shape"):
        loss_of(torch.zeros(3, 6), torch.zeros(3, 7))
    with pytest.raises(InvalidArgumentError, match="student's logits have 3 rows, but the teacher's have 2"):
        loss_of(torch.zeros(3, 6), torch.zeros(2, 6))
    with pytest.raises(NonFiniteError):
        loss_of(torch.zeros(3, 6), torch.full((3, 6), math.nan))


def test_where_looking_would_wait_for_the_device_the_loss_is_nan_and_can_be_explained():
    loss_of = SemanticSoftmaxLoss(SMALL)
    targets = torch.tensor([0, 6])
    assert loss_of._plain(torch.zeros(2, 6), targets).isnan()
    with pytest.raises(InvalidArgumentError, match="A target is 6"):
        explain(loss_of.levels, torch.zeros(2, 6), targets)
    why = explain(loss_of.levels, torch.tensor([[math.inf] * 6, [0.0] * 6]), targets.clamp_max(5))
    assert "6 logits in 1 of 2 rows" in why


@pytest.mark.parametrize(("make", "value"), [(SemanticSoftmaxLoss, 1.0), (SingleLabelLoss, -0.1)])
def test_smoothing_out_of_range(make, value):
    with pytest.raises(InvalidArgumentError, match="label_smoothing"):
        make(SMALL, value)


def test_an_order_that_does_not_exist():
    with pytest.raises(InvalidArgumentError, match="order must be 'published' or 'level'"):
        SemanticSoftmaxLoss(SMALL, order="alphabetical")


def test_without_a_gradient_none_is_computed():
    loss_of = SemanticSoftmaxLoss(SMALL)
    with torch.no_grad():
        loss = loss_of(torch.zeros(2, 6, requires_grad=True), torch.tensor([0, 1]))
    assert not loss.requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("path", ["forward", "_plain"])
def test_torch_compile_takes_it_whole(order, path):
    loss_of = SemanticSoftmaxLoss(SMALL, order=order)
    logits, targets = torch.randn(4, 6, requires_grad=True), torch.tensor([0, 1, 2, 5])
    compiled = torch.compile(getattr(loss_of, path), fullgraph=True, backend="aot_eager")
    loss, expected = compiled(logits, targets), loss_of(logits, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (loss, expected)))


@pytest.mark.slow
@pytest.mark.parametrize("make", [SingleLabelLoss, MultiLabelLoss, SemanticDistillationLoss])
def test_torch_compile_takes_the_others_whole(make):
    loss_of = make(SMALL)
    logits = torch.randn(4, 6, requires_grad=True)
    other = torch.randn(4, 6) if make is SemanticDistillationLoss else torch.tensor([0, 1, 2, 5])
    loss, expected = torch.compile(loss_of, fullgraph=True, backend="aot_eager")(logits, other), loss_of(logits, other)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, logits)[0] for each in (loss, expected)))


@pytest.mark.gpu
@pytest.mark.parametrize("order", ORDERS)
def test_a_gpu_is_not_waited_for(order):
    loss_of = SemanticSoftmaxLoss(SMALL, order=order).cuda()
    logits, targets = torch.randn(9, len(SMALL), device="cuda", requires_grad=True), torch.arange(9).cuda() % len(SMALL)
    loss_of(logits, targets).backward()  # triggers one-time set-up
    try:
        with warnings.catch_warnings(action="ignore"):  # it warns that it misses some synchronisations
            torch.cuda.set_sync_debug_mode("error")
        loss_of(logits, targets).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("made", [SemanticSoftmaxLoss, SemanticDistillationLoss, SingleLabelLoss, SemanticAccuracy])
def test_a_name_is_no_tree(made):
    with pytest.raises(InvalidArgumentError, match=r"'fall11' is not a tree; pass one such as SemanticTree.load"):
        made("fall11")


def test_one_softmax_is_the_same_in_either_order():
    logits, targets = torch.randn(6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    levels = Levels(SMALL, "level")
    assert levels.columns.tolist() != levels.positions.tolist()
    expected = F.cross_entropy(logits, targets, label_smoothing=0.3)
    torch.testing.assert_close(SingleLabelLoss(SMALL, 0.3)(logits, targets), expected)
    torch.testing.assert_close(SingleLabelLoss(SMALL, 0.3, "level")(logits[:, levels.columns], targets), expected)


@pytest.mark.parametrize("made", [SemanticSoftmaxLoss, SingleLabelLoss, MultiLabelLoss])
@pytest.mark.parametrize("target", [-1, 6])
def test_where_nobody_looks_a_target_out_of_range_is_nan(made, target):
    loss = torch.compile(made(SMALL), backend="eager")
    logits = torch.zeros(2, 6)
    assert loss(logits, torch.tensor([0, 1])).isfinite()
    assert loss(logits, torch.tensor([0, target])).isnan()


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:FutureWarning")  # used by torch's own derivative rules
@pytest.mark.parametrize("order", ORDERS)
def test_a_derivative_forwards_is_that_of_the_gradient(order):
    loss_of, targets = SemanticSoftmaxLoss(SMALL, 0.2, order), torch.arange(len(SMALL))
    logits = torch.randn(len(SMALL), len(SMALL), generator=torch.Generator().manual_seed(1), requires_grad=True)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(loss_of(logits, targets), logits)
    loss, derivative = torch.func.jvp(lambda each: loss_of(each, targets), (logits.detach(),), (direction,))
    torch.testing.assert_close(loss, loss_of(logits, targets).detach())
    torch.testing.assert_close(derivative, (gradient * direction).sum(), check_dtype=False)


@pytest.mark.parametrize("order", ORDERS)
def test_without_smoothing_other_classes_may_be_masked(order):
    loss_of, targets = SemanticSoftmaxLoss(SMALL, 0.0, order), torch.arange(len(SMALL))
    logits = torch.randn(len(SMALL), len(SMALL))
    masked = torch.ones_like(logits, dtype=torch.bool)
    for target, chain in enumerate(SMALL.class_tree_list):
        masked[target, chain] = False
    logits = in_order(loss_of.levels, logits.masked_fill(masked, -math.inf)).requires_grad_()
    loss = loss_of(logits, targets)
    torch.testing.assert_close(loss, loss_of._plain(logits, targets))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


def test_logits_are_of_a_floating_type():
    for dtype in (torch.int64, torch.complex64, torch.bool):
        logits = torch.zeros(2, len(SMALL), dtype=dtype)
        for loss_of in (SemanticSoftmaxLoss(SMALL), SingleLabelLoss(SMALL), MultiLabelLoss(SMALL)):
            with pytest.raises(InvalidArgumentError, match="must have a floating-point dtype"):
                loss_of(logits, torch.tensor([0, 1]))
    with pytest.raises(InvalidArgumentError, match="label_smoothing must be"):
        SemanticSoftmaxLoss(SMALL, "a")


def test_negatives_below_the_clip_count_nothing_whatever_the_exponent():
    loss_of = MultiLabelLoss(SMALL, gamma_negative=0, gamma_positive=0, clip=0.1)
    logits = torch.full((1, len(SMALL)), -9.0)
    logits[0, SMALL.class_tree_list[3]] = 30.0
    assert loss_of(logits, torch.tensor([3])).item() == pytest.approx(0, abs=1e-6)


def test_losses_have_no_state():
    """So a checkpoint that holds a loss loads whatever a version does with its constants."""
    for loss_of in (SemanticSoftmaxLoss(SMALL), SingleLabelLoss(SMALL), MultiLabelLoss(SMALL)):
        assert not loss_of.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_what_compilers_are_told_of_the_loss_is_so(order, dtype):
    levels = SemanticSoftmaxLoss(SMALL, order=order).levels
    places = (levels.columns, levels.positions) if order == "published" else (None, None)
    bounds = [where.start for where in levels.slices], [where.stop for where in levels.slices]
    logits = torch.randn(3, len(SMALL), dtype=dtype)
    given = (logits, levels.ancestors[:3], *places, *bounds, list(levels.weights), 0.2)
    torch.library.opcheck(losses._semantic_softmax, given, test_utils=("test_schema", "test_faketensor"))


def test_what_is_no_tensor_and_what_is_mixed_is_explained():
    logits, targets = torch.zeros(2, len(SMALL)), torch.tensor([0, 1])
    for loss_of in (SemanticSoftmaxLoss(SMALL), SingleLabelLoss(SMALL), MultiLabelLoss(SMALL)):
        with pytest.raises(InvalidArgumentError, match="logits must be a tensor, not ndarray"):
            loss_of(logits.numpy(), targets)
        with pytest.raises(InvalidArgumentError, match="targets must be a tensor, not list"):
            loss_of(logits, [0, 1])
        with pytest.raises(InvalidArgumentError, match="add the losses of both targets, weighted by their shares"):
            loss_of(logits, torch.eye(len(SMALL))[:2])


def of_rows(loss_of, logits, targets):
    return loss_of(logits, targets if targets is not None else logits.flip(0))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("made", [SemanticSoftmaxLoss, SemanticDistillationLoss, SingleLabelLoss, MultiLabelLoss])
def test_a_loss_per_sample_is_what_is_reduced(made, order):
    logits, targets = torch.randn(8, len(SMALL), dtype=torch.float64), torch.tensor([0, 5, 3, 3, 1, 2, 4, 0])
    targets = None if made is SemanticDistillationLoss else targets
    gradients = {}
    for reduction in ("none", "sum", "mean"):
        given = logits.clone().requires_grad_()
        found = of_rows(made(SMALL, order=order, reduction=reduction), given, targets)
        gradients[reduction] = found, *torch.autograd.grad(found.sum(), given)
    each, gradient = gradients["none"]
    assert each.shape == (8,)
    assert each.dtype == torch.float32
    torch.testing.assert_close(gradients["sum"], (each.sum(), gradient))
    torch.testing.assert_close(gradients["mean"], (each.mean(), gradient / 8))
    if targets is not None:
        one = made(SMALL, order=order)
        alone = torch.stack([one(row[None], target[None]) for row, target in zip(logits, targets, strict=True)])
        torch.testing.assert_close(each, alone)


@pytest.mark.parametrize("order", ORDERS)
def test_weights_of_samples_weigh_their_gradients(order):
    loss_of = SemanticSoftmaxLoss(SMALL, order=order, reduction="none")
    logits, targets = torch.randn(4, len(SMALL), requires_grad=True), torch.tensor([3, 0, 5, 1])
    weights = torch.tensor([2.0, 0.0, 0.5, 1.0])
    (gradient,) = torch.autograd.grad((weights * loss_of(logits, targets)).sum(), logits)
    plain = torch.stack([weight * each for weight, each in zip(weights, loss_of._plain(logits, targets), strict=True)])
    torch.testing.assert_close(gradient, torch.autograd.grad(plain.sum(), logits)[0])
    assert not gradient[1].any()
    assert gradient[0].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("made", [SemanticSoftmaxLoss, SemanticDistillationLoss, SingleLabelLoss, MultiLabelLoss])
def test_an_empty_batch_has_no_loss_but_a_gradient(made, reduction):
    logits = torch.zeros(0, len(SMALL), requires_grad=True)
    targets = None if made is SemanticDistillationLoss else torch.zeros(0, dtype=torch.int64)
    found = of_rows(made(SMALL, reduction=reduction), logits, targets)
    assert found.tolist() == ([] if reduction == "none" else 0.0)
    assert torch.autograd.grad(found.sum(), logits)[0].shape == logits.shape


def test_reductions_have_names():
    with pytest.raises(InvalidArgumentError, match="reduction is 'average'; it can be mean, sum, none"):
        SingleLabelLoss(SMALL, reduction="average")


@pytest.mark.parametrize("made", [SemanticSoftmaxLoss, SemanticDistillationLoss, SemanticAccuracy])
def test_a_tree_without_a_level_has_nothing_to_train(made):
    chain = SemanticTree.from_wnids(["n02121808", "n02123045"])  # one class, and one below it
    with pytest.raises(InvalidArgumentError, match="custom has no level"):
        made(chain)


@pytest.mark.parametrize(
    ("logits", "targets", "advice"),
    [
        (torch.zeros(2, 6, 4, 4), torch.zeros(2, 4, 4), "put classes last and flatten the others"),
        (torch.zeros(2, 6), torch.zeros(2, 6, dtype=torch.int64), r"targets.int\(\).argmax\(1\)"),
        (torch.zeros(2, 6), torch.zeros(2, dtype=torch.int32), r"targets.long\(\)"),
        (torch.zeros(2, 6), torch.tensor([0, -100]), "leave out the rows"),
    ],
    ids=["positions", "one-hot", "int32", "ignored"],
)
def test_usual_mistakes_get_advice(logits, targets, advice):
    with pytest.raises(InvalidArgumentError, match=advice):
        SemanticSoftmaxLoss(SMALL)(logits, targets)


def test_printing_a_loss_tells_its_settings():
    shown = repr(SemanticSoftmaxLoss(SMALL, 0.1, "level"))
    assert "label_smoothing=0.1, reduction='mean'" in shown
    assert "SemanticTree('small'" in shown
    assert "'level'" in shown
