"""Augmentations besides the published one: random resized crop, flip, and what the modern preset adds; centre crop.

Images are uint8 arrays [height, width, 3] in RGB; all randomness comes from ``random.Random.random`` and the
raw output of NumPy's Philox generator, which do not change with their versions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

import numpy as np

from wn21k_zoo.errors import InvalidArgumentError, check_share, whole_number
from wn21k_zoo.images import check_resized
from wn21k_zoo.training.augment import OPERATIONS, Image, resize
from wn21k_zoo.training.extra import cv2

__all__ = ["CenterCrop", "RandomCrop"]

_ASPECTS = (3 / 4, 4 / 3)  # as in arXiv 1409.4842 and torchvision
_ERASED = (0.02, 1 / 3)  # share of the image; arXiv 1708.04896
_ERASED_ASPECTS = (0.3, 1 / 0.3)


@dataclass(frozen=True)
class RandomCrop:
    """A random resized crop, flipped left to right half the time; then whatever is switched on.

    Args:
        size: Side of the result in pixels.
        scale: Smallest share of the image's area for the crop; the largest is 1 (arXiv 1409.4842).
        operations: Number of RandAugment operations (arXiv 1909.13719), with the published magnitudes.
        erase: Probability that a random rectangle is filled with noise (arXiv 1708.04896).

    Raises:
        InvalidArgumentError: A number is out of range.
    """

    size: int = 224
    scale: float = 0.08
    operations: int = 0
    erase: float = 0.0

    def __post_init__(self) -> None:
        whole_number("size", self.size, 1)
        whole_number("operations", self.operations, 0)
        check_share("erase", self.erase)
        if not 0 < self.scale <= 1:
            raise InvalidArgumentError(f"scale is {self.scale}; it must be in (0, 1].")

    def __call__(self, image: Image, random: Random) -> Image:
        """Augment: [height, width, 3] to [size, size, 3], a new array."""
        top, left, height, width = _part(image.shape[:2], self.scale, random)
        part = image[top : top + height, left : left + width]
        shrinks = height > self.size or width > self.size
        part = cv2.resize(
            part, (self.size, self.size), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
        ).astype(np.uint8, copy=False)
        if random.random() < 0.5:
            part = np.ascontiguousarray(part[:, ::-1])
        names = tuple(OPERATIONS)
        for _ in range(self.operations):
            name, index = names[int(random.random() * len(names))], 1 + int(random.random() * 9)
            part = OPERATIONS[name](part, index, random)
        if self.erase and random.random() < self.erase:
            drawn = _rectangle(part.shape[:2], _ERASED, _ERASED_ASPECTS, random)
            noise = np.random.Philox(key=int(random.random() * 2**53))
            if drawn is not None:
                top, left, height, width = drawn
                values = noise.random_raw(-(-height * width * 3 // 8)).astype("<u8").view(np.uint8)
                part[top : top + height, left : left + width] = values[: height * width * 3].reshape(height, width, 3)
        return part


@dataclass(frozen=True)
class CenterCrop:
    """Preprocessing for evaluation with a ``crop_pct``, as in timm: shorter side to size / crop_pct, then the centre.

    Args:
        size: Side of the result in pixels.
        crop_pct: Share of the shorter side that the crop keeps.

    Raises:
        InvalidArgumentError: A number is out of range.
    """

    size: int = 224
    crop_pct: float = 0.875

    def __post_init__(self) -> None:
        whole_number("size", self.size, 1)
        if not 0 < self.crop_pct <= 1:
            raise InvalidArgumentError(f"crop_pct is {self.crop_pct}; it must be in (0, 1].")

    def __call__(self, image: Image, random: Random) -> Image:
        """Crop: [height, width, 3] to [size, size, 3]; nothing is drawn from ``random``.

        Raises:
            ImageTooLargeError: The image is so elongated that it would be enormous before the crop.
        """
        height, width = image.shape[:2]
        wanted, shorter = math.floor(self.size / self.crop_pct), min(height, width)
        check_resized((width, height), wanted, "The image")
        resized = resize(image, wanted * height // shorter, wanted * width // shorter)
        top, left = (round((side - self.size) / 2) for side in resized.shape[:2])
        return np.ascontiguousarray(resized[top : top + self.size, left : left + self.size])


def _rectangle(
    shape: tuple[int, ...], scale: tuple[float, float], aspects: tuple[float, float], random: Random
) -> tuple[int, int, int, int] | None:
    """Top, left, height and width of a random rectangle; None if none of ten draws fits, as in torchvision."""
    height, width = shape
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * random.random())
        low, high = (math.log(aspect) for aspect in aspects)
        aspect = math.exp(low + (high - low) * random.random())
        wide, tall = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            return (int(random.random() * (height - tall + 1)), int(random.random() * (width - wide + 1)), tall, wide)
    return None


def _part(shape: tuple[int, ...], scale: float, random: Random) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop; the largest central one if none of ten draws fits."""
    if drawn := _rectangle(shape, (scale, 1.0), _ASPECTS, random):
        return drawn
    height, width = shape
    wide = min(width, max(1, round(height * _ASPECTS[1])))
    tall = min(height, max(1, round(width / _ASPECTS[0])))
    return (height - tall) // 2, (width - wide) // 2, tall, wide
