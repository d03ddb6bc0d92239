"""Mix the images of a batch with each other: mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import Beta

__all__ = ["mix"]


def mix(images: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, float]:
    """Mix each image with the one at its place in the reversed batch.

    One share is drawn per batch, from torch's CPU generator; where both methods are asked for, each gets half of the
    batches.

    Args:
        images: [batch, channels, height, width].
        mixup: Both parameters of the Beta distribution of the share with which pixels are blended; 0 turns mixup off.
        cutmix: The same for the share outside the rectangle that is taken from the other image.

    Returns:
        The mixed images, and the share of the original in each: the rest is from ``images.flip(0)``.
    """
    if not mixup and not cutmix:
        return images, 1.0
    cuts = bool(cutmix) and (not mixup or float(torch.rand(())) < 0.5)
    alpha = cutmix if cuts else mixup
    share = float(Beta(alpha, alpha).sample())
    others = images.flip(0)
    if not cuts:
        return images.lerp(others, 1 - share), share
    height, width = images.shape[-2:]
    top, bottom = _part(height, math.sqrt(1 - share))
    left, right = _part(width, math.sqrt(1 - share))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, 1 - (bottom - top) * (right - left) / (height * width)


def _part(length: int, share: float) -> tuple[int, int]:
    """Return a share of a side, around a random place, cut off where it would leave the side."""
    size, centre = int(length * share), int(float(torch.rand(())) * length)
    begin = centre - size // 2
    return max(0, begin), min(length, begin + size)
