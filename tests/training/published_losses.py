"""Values of the published losses and metric on rule-made inputs, and ours on the same inputs."""

import json
from pathlib import Path

import numpy as np
import torch

from wn21k_zoo.training.losses import SemanticDistillationLoss, SemanticSoftmaxLoss
from wn21k_zoo.training.metrics import SemanticAccuracy
from wn21k_zoo.tree import SemanticTree

LOSSES = json.loads((Path(__file__).parent.parent / "data" / "published_losses.json").read_text())["cases"]
ORDERS = ("published", "level")  # of logits
WAYS = ("forward", "_plain")  # of computing semantic softmax
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def _inputs(seed, num_classes, batch):
    """Student logits, targets and teacher logits; every other sample is correct."""
    rng = np.random.Generator(np.random.PCG64(seed))
    student = (3 * rng.standard_normal((batch, num_classes))).astype(np.float32)
    targets = rng.integers(0, num_classes, batch)
    teacher = (3 * rng.standard_normal((batch, num_classes))).astype(np.float32)
    student[range(0, batch, 2), targets[::2]] += 15
    return torch.from_numpy(student), torch.from_numpy(targets), torch.from_numpy(teacher)


def loss_values(case, order, way="forward", device="cpu"):
    """Our values on the same inputs as numbers, by their names in :data:`LOSSES`."""
    tree = SemanticTree.load(case)
    inputs = _inputs(11, len(tree), LOSSES[case]["B"])
    student, targets, teacher = (each.to(device) for each in inputs)
    loss_of, metric = SemanticSoftmaxLoss(tree, 0.2, order).to(device), SemanticAccuracy(tree, order).to(device)
    levels = loss_of.levels
    if order == "level":
        student, teacher = student[:, levels.columns], teacher[:, levels.columns]
    student.requires_grad_()
    loss = getattr(loss_of, way)(student, targets)
    loss.backward()
    gradient = student.grad if order == "published" else student.grad[:, levels.positions]
    student = student.detach()
    for rows in (slice(0, 5), slice(5, 5), slice(5, None)):
        metric.update(student[rows], targets[rows])
    return {
        "targets": targets.tolist(),
        "semantic_targets": levels.ancestors[targets].tolist(),
        "loss": loss.item(),
        "grad_abs_sum": gradient.abs().sum().item(),
        "grad_first8": gradient[0, :8].tolist(),
        "grad_at_target": gradient[torch.arange(len(targets)), targets].tolist(),
        "kd_loss": SemanticDistillationLoss(tree, order).to(device)(student, teacher).item(),
        "semantic_accuracy": metric.compute()["semantic_top1"],
    }
