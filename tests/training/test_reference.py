"""Runs compared with the same training in plain torch: what a step, an epoch and an evaluation compute."""

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn import functional as F

from wn21k_zoo.training import engine
from wn21k_zoo.training.data import Squash, open_folder
from wn21k_zoo.training.order import SampleOrder
from wn21k_zoo.tree import SemanticTree

from .checks import final, lines, run
from .runs import BATCH, small_recipe

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS_PER_EPOCH = 54 // BATCH
ADAMW = {"name": "adamw", "lr": 2e-3, "weight_decay": 0.3, "betas": (0.8, 0.95)}
SGD = {"name": "sgd", "lr": 2e-5, "weight_decay": 30.0, "momentum": 0.8}


def pixels(folder, sample):
    with Image.open(folder.root / folder.name(sample)) as image:
        squashed = Squash(32)(np.asarray(image.convert("RGB")), None)
    return torch.from_numpy(np.asarray(squashed)).permute(2, 0, 1) / 255


def batch_of(folder, samples):
    return torch.stack([pixels(folder, sample) for sample in samples]), torch.tensor(folder.targets[samples]).long()


def levels_of(tree):
    """Class indices of each depth, and each class's ancestor there as a position among them, -1 for none."""
    members = [np.flatnonzero(tree.depths == depth).tolist() for depth in range(2)]
    places = []
    for target in range(len(tree)):
        chain = {int(tree.depths[index]): index for index in tree.class_tree_list[target]}
        places.append([members[depth].index(chain[depth]) if depth in chain else -1 for depth in range(2)])
    return members, torch.tensor(places)


def loss_of(recipe, logits, targets, tree, teacher):
    """In level order: first the outputs of depth 0, then those of depth 1."""
    members, places = levels_of(tree)
    parts = logits.split([len(each) for each in members], 1)
    if recipe.loss.kind == "single_label":
        order = [index for each in members for index in each]
        place = torch.tensor([order.index(target) for target in targets.tolist()])
        return F.cross_entropy(logits, place, label_smoothing=recipe.loss.label_smoothing)
    loss = 0.0
    for depth, part in enumerate(parts):
        deeper = sum(len(each) for each in members[depth:])
        of_level = F.cross_entropy(
            part, places[targets, depth], ignore_index=-1, reduction="sum", label_smoothing=recipe.loss.label_smoothing
        )
        loss = loss + min(20.0, 6 / deeper) * of_level / len(targets)
    if teacher is not None:
        for ours, theirs in zip(parts, teacher.split([len(each) for each in members], 1), strict=True):
            p = theirs.softmax(1)
            certainty = p.max(1).values  # 5 % of three classes, rounded up to one
            distance = ((ours.softmax(1) - p).square().sum(1) * certainty).sum() / len(targets)
            loss = loss + recipe.loss.distillation_weight * distance
    return loss


def rate_of(recipe, step, steps):
    warmup = round(recipe.schedule.warmup * steps)
    start, end = 1 / recipe.schedule.start_divisor, 1 / recipe.schedule.end_divisor
    if step < warmup:
        return recipe.optimizer.lr * (start + (1 - start) * step / warmup)
    return recipe.optimizer.lr * (end + (1 - end) * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2)


def by_hand(recipe, data, teacher):
    """Weights, moving average, and the loss and learning rate of each step."""
    folder, tree = open_folder(data), SemanticTree.from_wnids(open_folder(data).class_names)
    torch.manual_seed(recipe.run.seed)
    network = timm.create_model(recipe.model.architecture, num_classes=6)
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (recipe.model.mean, recipe.model.std))
    decayed = [each for each in network.parameters() if each.ndim > 1]
    others = [each for each in network.parameters() if each.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": recipe.optimizer.weight_decay}, {"params": others, "weight_decay": 0}]
    if recipe.optimizer.name == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=recipe.optimizer.betas)
    else:
        optimizer = torch.optim.SGD(groups, momentum=recipe.optimizer.momentum, nesterov=True)
    steps = recipe.schedule.epochs * STEPS_PER_EPOCH
    average, losses, rates, norms = None, [], [], []
    for step in range(steps):
        epoch, within = divmod(step, STEPS_PER_EPOCH)
        order = SampleOrder((54,), recipe.data.window, recipe.run.seed)
        _, samples, _ = order.samples(epoch, within * BATCH, (within + 1) * BATCH)
        rates.append(rate_of(recipe, step, steps))
        for group in optimizer.param_groups:
            group["lr"] = rates[-1]
        total = 0.0
        for part in np.split(samples, BATCH // recipe.data.batch_per_device):
            images, targets = batch_of(folder, part)
            with torch.no_grad():
                taught = teacher(images) if teacher is not None else None
            loss = loss_of(recipe, network.train()((images - mean) / std), targets, tree, taught)
            loss = loss * len(part) / BATCH
            loss.backward()
            total += float(loss.detach())
        losses.append(total)
        norms.append(float(torch.nn.utils.clip_grad_norm_(network.parameters(), recipe.optimizer.clip_norm)))
        optimizer.step()
        optimizer.zero_grad()
        state = {name: value.clone() for name, value in network.state_dict().items()}
        decay = min(recipe.run.ema_decay, step / (step + 10))
        average = {
            name: decay * average[name] + (1 - decay) * value if average and value.is_floating_point() else value
            for name, value in state.items()
        }
    assert min(norms) < recipe.optimizer.clip_norm < max(norms)  # some are clipped and some are not
    network.load_state_dict(average)
    validation = open_folder(data, "validation")
    images, targets = batch_of(validation, np.arange(len(validation)))
    with torch.no_grad():
        logits = network.eval()((images - mean) / std)
    return state, average, losses, rates, semantic_top1(tree, logits, targets)


def semantic_top1(tree, logits, targets):
    members, places = levels_of(tree)
    right = valid = 0
    for depth, part in enumerate(logits.split([len(each) for each in members], 1)):
        there = places[targets, depth] >= 0
        right += int((part.argmax(1) == places[targets, depth])[there].sum())
        valid += int(there.sum())
    return 100 * right / valid


@pytest.mark.parametrize(
    ("architecture", "kind", "teacher", "optimizer"),
    [
        ("test_convnext", "semantic_softmax", None, ADAMW | {"clip_norm": 5.0}),
        # Adam may divide by values near 0, which amplifies rounding with batch statistics.
        ("test_efficientnet", "semantic_softmax", "random:resnet10t", SGD | {"clip_norm": 200.0}),
        pytest.param("test_convnext", "single_label", None, ADAMW | {"clip_norm": 2.2}, marks=pytest.mark.slow),
    ],
)
def test_a_run_computes_what_is_written_down_here(data, tmp_path, monkeypatch, architecture, kind, teacher, optimizer):
    recipe = small_recipe(
        architecture,
        model={"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.3), "channels_last": False},
        data={"augmentation": "none", "batch_per_device": 4},
        loss={"kind": kind, "label_smoothing": 0.13, "teacher": teacher, "distillation_weight": 3.0 if teacher else 0},
        optimizer=optimizer,
        schedule={"name": "cosine", "warmup": 0.3, "start_divisor": 10.0, "end_divisor": 4.0},
        run={"seed": 3, "ema_decay": 0.4},
    )
    learners = []

    class Watched(engine.Learner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            learners.append(self)

    monkeypatch.setattr(engine, "Learner", Watched)
    figures = run(recipe, data, tmp_path)
    weights, average, losses, rates, top1 = by_hand(recipe, data, learners[0]._teacher)
    found = lines(tmp_path)
    assert [line["lr"] for line in found] == pytest.approx(rates)
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=1e-4)
    checkpoint = final(tmp_path)
    for name, value in weights.items():
        torch.testing.assert_close(checkpoint["model"][name], value, rtol=1e-3, atol=1e-4, msg=name)
    kept = {
        name.removeprefix("module.").removeprefix("module."): value for name, value in checkpoint["average"].items()
    }
    for name, value in average.items():
        torch.testing.assert_close(kept[name], value, rtol=1e-3, atol=1e-4, msg=name)
    assert any((average[name] - value).abs().max() > 4e-4 for name, value in weights.items())
    if kind == "semantic_softmax":
        assert figures["semantic_top1"] == pytest.approx(top1)
