"""The device operations of a training step, tested without a GPU: none may make the host wait for one."""

import re

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.algorithms import about_precision
from wn21k_zoo.training.data import Batch
from wn21k_zoo.training.distributed import World
from wn21k_zoo.training.evaluation import Evaluation
from wn21k_zoo.training.learner import Learner
from wn21k_zoo.training.losses import MultiLabelLoss, SemanticDistillationLoss, SemanticSoftmaxLoss, SingleLabelLoss
from wn21k_zoo.training.optimization import average_of, build_optimizer
from wn21k_zoo.training.splits import open_splits
from wn21k_zoo.training.teacher import Translated
from wn21k_zoo.tree import SemanticTree

from .fake_gpu import Traffic, fake_gpu, moved
from .runs import make_folder, small_recipe

TREE = SemanticTree.load("fall11")
CLASSES = len(TREE)
HEADS = ("semantic_softmax", "softmax", "sigmoid")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def batch(dtype=torch.float32, classes=CLASSES, device="cuda", size=8):
    logits = torch.empty(size, classes, dtype=dtype, device=device, requires_grad=True)
    return logits, torch.empty(size, dtype=torch.int64, device=device)


def forward_and_backward(loss_of, *inputs, dtype):
    """Run a loss on a fake GPU; ``inputs`` are indices into what :func:`batch` returns."""
    with fake_gpu():
        loss = moved(loss_of)(*(batch(dtype)[which] for which in inputs))
        assert (loss.dtype, loss.shape, loss.device.type) == (torch.float32, (), "cuda")
    given = [batch(dtype, device="meta")[which] for which in inputs]
    moved(loss_of, "meta")(*given).backward()
    assert (given[0].grad.dtype, given[0].grad.shape) == (dtype, given[0].shape)
    return given


def test_it_notices_what_waits():
    with fake_gpu():
        logits, targets = batch()
        for waits in (
            lambda: float(logits.sum()),
            lambda: bool(targets.any()),
            lambda: targets.nonzero(),
            lambda: logits[targets > 3],
        ):
            with pytest.raises(RuntimeError):
                waits()
        with pytest.raises(RuntimeError, match=r"cuda:0(,| and) cpu"):
            logits + torch.ones(8, 1)
        for copies in (lambda: targets.cpu(), lambda: torch.ones(8).cuda(), lambda: targets.copy_(torch.ones(8))):
            with pytest.raises(AssertionError, match="to the other"):
                copies()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["published", "level"])
@pytest.mark.parametrize("kind", [SemanticSoftmaxLoss, SingleLabelLoss, MultiLabelLoss])
def test_losses_wait_for_nothing(kind, order, dtype):
    forward_and_backward(kind(TREE, order=order), 0, 1, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ["published", "level"])
@pytest.mark.parametrize("per_level", [True, False])
def test_distillation_waits_for_nothing(per_level, order, dtype):
    _, teacher = forward_and_backward(SemanticDistillationLoss(TREE, order, per_level), 0, 0, dtype=dtype)
    assert teacher.grad is None


def test_a_softmax_per_level_moves_little_more_than_one_over_all_classes():
    logits, targets = batch(device="meta", size=256)
    with Traffic() as one:
        F.cross_entropy(logits, targets, label_smoothing=0.2).backward()
    logits, targets = batch(device="meta", size=256)
    with Traffic() as levels:
        moved(SemanticSoftmaxLoss(TREE, order="level"), "meta")(logits, targets).backward()
    assert one.bytes > 5 * logits.nbytes
    assert levels.bytes < 1.3 * one.bytes  # one extra read and write, to concatenate the gradients


@pytest.mark.parametrize(("tree", "order"), [(TREE, "published"), (TREE, "level"), (None, "published")])
@pytest.mark.parametrize("head", HEADS)
def test_metrics_wait_for_nothing(head, tree, order):
    evaluation = Evaluation(tree, head, range(0, CLASSES, 50), order)
    with fake_gpu():
        logits, targets = batch()
        moved(evaluation).update(logits.detach(), targets)


@pytest.mark.parametrize("student", ["semantic_softmax", "softmax"])
@pytest.mark.parametrize("head", HEADS)
def test_teachers_wait_for_nothing(head, student):
    space = LabelSpace.load("winter21")
    teacher = Translated(nn.Identity(), space, head, TREE, student)
    with fake_gpu():
        found = moved(teacher)(batch(classes=len(space))[0].detach())
        assert (found.shape, found.device.type) == ((8, CLASSES), "cuda")


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "lamb", "sgd"])
def test_a_step_waits_for_nothing(tmp_path, optimizer):
    recipe = small_recipe(
        "test_resnet",
        data={"label_space": "fall11"},
        optimizer={"name": optimizer, "clip_norm": 1.0},
    )
    splits = open_splits(recipe, make_folder(tmp_path, 10))
    learner = Learner(recipe, splits, World(0, 1, torch.device("meta")), 10)
    images, targets = torch.empty(8, 3, 32, 32, device="meta"), torch.empty(8, dtype=torch.int64, device="meta")
    for _ in range(2):
        learner.begin()
        learner.backward(learner.loss(Batch(images, targets, torch.arange(8))))
        learner.update()


@pytest.mark.parametrize("name", ["adam", "adamw"])  # torch cannot run a fused SGD on tensors without values
def test_in_fp16_fused_optimizers_wait_for_nothing(name, monkeypatch):
    module = timm.create_model("test_resnet", num_classes=3)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        scaler = torch.amp.GradScaler("cuda")
    with fake_gpu():
        moved(module)
        optimizer = build_optimizer(small_recipe(optimizer={"name": name}, run={"precision": "fp16"}), module)
        scaler.scale(torch.zeros((), device="cuda"))
        for parameter in module.parameters():
            parameter.grad = torch.empty_like(parameter)
        for clips in (True, False):
            if clips:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_which_optimizers_are_fused(name, precision):
    module = timm.create_model("test_resnet", num_classes=3)
    recipe = small_recipe(optimizer={"name": name}, run={"precision": precision})
    assert not any(group["fused"] for group in build_optimizer(recipe, module).param_groups)
    with fake_gpu():
        moved(module)
        found = {group["fused"] for group in build_optimizer(recipe, module).param_groups}
    assert found == {None if (name, precision) == ("sgd", "fp16") else True}


def test_the_moving_average_waits_for_nothing():
    module = timm.create_model("test_resnet", num_classes=3)
    average = average_of(module, 0.9)
    with fake_gpu():
        moved(module), moved(average)
        for step in (1, 2):
            average.update(module, step)


@pytest.mark.parametrize(
    ("precision", "device", "has_bf16", "advised"),
    [
        ("fp32", "cpu", False, None),
        ("bf16", "cpu", False, None),
        ("fp16", "cpu", False, "fp32"),
        ("fp32", "cuda", True, "bf16"),
        ("fp32", "cuda", False, "fp16"),
        ("bf16", "cuda", True, None),
        ("bf16", "cuda", False, "fp16"),
        ("fp16", "cuda", True, None),
        ("fp32", "mps", False, None),
    ],
)
def test_a_precision_that_suits_the_device_is_advised(monkeypatch, precision, device, has_bf16, advised):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16)
    advice = about_precision(precision, torch.device(device))
    assert re.findall(r"run.precision=(\w+)", advice) == ([advised] if advised else [])
