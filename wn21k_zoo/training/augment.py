"""The augmentation of "ImageNet-21K Pretraining for the Masses" (Ridnik et al. 2021) on arrays.

Squash to a square, cut out a random rectangle, then RandAugment: two operations, each drawn uniformly from
15 operations x 9 magnitudes and applied with probability 0.5. The parameters are those of the paper's repository,
https://github.com/Alibaba-MIIL/ImageNet21K (``src_files/data_loading``), and of the PyPI package randaugment 1.0.2
that it uses; both work on Pillow images. Here images are uint8 arrays [height, width, 3] in RGB.

Every operation in :data:`OPERATIONS` gives the same bytes as Pillow's; tests/training/test_augment.py says for which
images this was checked. The squash is Pillow's own.

OpenCV's thread count is per process: a worker that shares its machine calls ``cv2.setNumThreads(1)``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from types import MappingProxyType
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from wn21k_zoo.errors import whole_number
from wn21k_zoo.training.extra import cv2

__all__ = ["OPERATIONS", "Image", "Operation", "PublishedAugmentation", "Squash", "cutout", "resize"]

Image: TypeAlias = NDArray[np.uint8]

_PROBABILITY = 0.5  # of each of the two operations
_GREY = 128  # fills what a shear, a translation or a rotation leaves uncovered
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / np.float32(13)  # like Pillow's filter of that name
_SQUARE_COLOUR = (125, 122, 113)  # of RandAugment's own cutout: about the mean colour of ImageNet
# How much is computed at once. Larger temporary arrays do not fit the L2 cache, and the C library requests their pages
# from the system and returns them each time, which costs more than the arithmetic.
_ROWS = 48
_VALUES = 32768


def resize(image: Image, height: int, width: int) -> Image:
    """Pillow's bilinear resize, with antialiasing: uint8 [height, width, 3]; the same array if it has that size."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(PILImage.fromarray(image).resize((width, height), PILImage.Resampling.BILINEAR))


def cutout(image: Image, centre: tuple[int, int], colour: tuple[int, int, int]) -> None:
    """Fill, in place, a rectangle of half the image's height and width with one colour.

    Both ends are included, as in ``PIL.ImageDraw.rectangle``: inside an image of 224 pixels it spans 113.

    Args:
        image: uint8 [height, width, 3].
        centre: Column and row of the centre in pixels.
        colour: Red, green, blue, each in 0..255.
    """
    (x, y), (height, width) = centre, image.shape[:2]
    half_width, half_height = int(0.5 * width + 0.5) // 2, int(0.5 * height + 0.5) // 2
    _fill(image, x - half_width, y - half_height, x + half_width + 1, y + half_height + 1, colour)


@dataclass(frozen=True)
class Operation:
    """An operation of RandAugment.

    Args:
        function: Takes the image, a magnitude from ``magnitudes`` (times 1 or -1 if ``signed``), and the source of any
            further randomness. Returns a new array of the same shape.
        magnitudes: One for each index 0..9; all 0 if the operation has none. Index 0 is never drawn.
        signed: Whether the sign of the magnitude is drawn at random.
    """

    function: Callable[[Image, float, Random], Image]
    magnitudes: tuple[float, ...]
    signed: bool = False

    def __call__(self, image: Image, index: int, random: Random) -> Image:
        """Apply the operation with the magnitude at that index, and a random sign if it is signed."""
        magnitude = self.magnitudes[index]
        if self.signed and random.random() < 0.5:
            magnitude = -magnitude
        return self.function(image, magnitude, random)


@dataclass(frozen=True)
class Squash:
    """Preprocessing for evaluation: resize only.

    Args:
        size: Side of the result in pixels.

    Raises:
        InvalidArgumentError: ``size`` is not a positive integer.
    """

    size: int = 224

    def __post_init__(self) -> None:
        whole_number("size", self.size, 1)

    def __call__(self, image: Image, random: Random) -> Image:
        """Resize: [height, width, 3] to [size, size, 3]; nothing is drawn from ``random``."""
        return resize(image, self.size, self.size)


@dataclass(frozen=True)
class PublishedAugmentation:
    """Squash, cutout and RandAugment, as the module's docstring describes them.

    All randomness comes from :meth:`random.Random.random`, whose sequence is the same in every version of Python:
    the same state gives the same result.

    Args:
        size: Side of the result in pixels.

    Raises:
        InvalidArgumentError: ``size`` is not a positive integer.
    """

    size: int = 224

    def __post_init__(self) -> None:
        whole_number("size", self.size, 1)

    def __call__(self, image: Image, random: Random) -> Image:
        """Augment an image.

        Args:
            image: uint8 [height, width, 3], RGB; not modified.
            random: The source of all randomness.

        Returns:
            uint8 [size, size, 3], a new array.
        """
        squashed = resize(image, self.size, self.size)
        if squashed is image:
            squashed = image.copy()
        centre = _integer(random, self.size), _integer(random, self.size)
        cutout(squashed, centre, (_integer(random, 256), _integer(random, 256), _integer(random, 256)))
        names = tuple(OPERATIONS)
        for _ in range(2):
            name, index = names[_integer(random, len(names))], 1 + _integer(random, 9)
            if random.random() < _PROBABILITY:
                squashed = OPERATIONS[name](squashed, index, random)
        return squashed


def _invert(image: Image, magnitude: float, random: Random) -> Image:
    return _image(cv2.bitwise_not(image))


def _posterize(image: Image, magnitude: float, random: Random) -> Image:
    return _image(np.bitwise_and(image, np.uint8(256 - 2 ** (8 - int(magnitude)))))


def _solarize(image: Image, magnitude: float, random: Random) -> Image:
    # For a non-integer threshold, value >= threshold means value > ceil(threshold) - 1.
    _, inverted = cv2.threshold(image, math.ceil(magnitude) - 1, 255, cv2.THRESH_BINARY)
    return _image(cv2.bitwise_xor(image, inverted))


def _auto_contrast(image: Image, magnitude: float, random: Random) -> Image:
    planes = cv2.split(image)
    extremes = [cv2.minMaxLoc(plane) for plane in planes]
    return _apply(planes, [_stretching(int(low), int(high)) for low, high, _, _ in extremes])


def _stretching(low: int, high: int) -> Image:
    if high <= low:
        return np.arange(256, dtype=np.uint8)
    scale = 255.0 / (high - low)
    return _image(np.clip(np.arange(256) * scale + -low * scale, 0, 255).astype(np.uint8))


def _equalize(image: Image, magnitude: float, random: Random) -> Image:
    planes = cv2.split(image)
    return _apply(planes, [_equalizing(cv2.calcHist([plane], [0], None, [256], [0, 256])) for plane in planes])


def _equalizing(histogram: NDArray[Any]) -> Image:
    # float32 counts are exact below 2**24 pixels of one value.
    counts = histogram.ravel().astype(np.int64)
    used = np.flatnonzero(counts)
    step = (int(counts.sum()) - int(counts[used[-1]])) // 255
    if len(used) <= 1 or not step:
        return np.arange(256, dtype=np.uint8)
    before = np.cumsum(counts) - counts
    return _image(np.minimum((step // 2 + before) // step, 255).astype(np.uint8))


def _apply(planes: Any, tables: list[Image]) -> Image:
    return _image(cv2.merge([cv2.LUT(plane, table) for plane, table in zip(planes, tables, strict=True)]))


def _brightness(image: Image, magnitude: float, random: Random) -> Image:
    return _image(cv2.LUT(image, _blend(np.zeros(256, np.uint8), np.arange(256, dtype=np.uint8), 1 + magnitude)))


def _contrast(image: Image, magnitude: float, random: Random) -> Image:
    luma = _luma(image)
    mean = int(cv2.sumElems(luma)[0] / luma.size + 0.5)
    return _image(cv2.LUT(image, _blend(np.full(256, mean, np.uint8), np.arange(256, dtype=np.uint8), 1 + magnitude)))


def _color(image: Image, magnitude: float, random: Random) -> Image:
    return _blend(_image(cv2.cvtColor(_luma(image), cv2.COLOR_GRAY2RGB)), image, 1 + magnitude)


def _sharpness(image: Image, magnitude: float, random: Random) -> Image:
    # A thirteenth of an integer is never halfway between two integers, so how the sum is rounded does not matter. The
    # border stays unchanged.
    smooth = image.copy()
    if min(image.shape[:2]) > 2:
        smooth[1:-1, 1:-1] = cv2.filter2D(image, -1, _SMOOTH)[1:-1, 1:-1]
    return _blend(smooth, image, 1 + magnitude)


def _blend(degenerate: Image, image: Image, factor: float) -> Image:
    """``degenerate + factor * (image - degenerate)`` as Pillow computes it: in float32, truncated."""
    blended = np.empty(image.shape, np.uint8)
    below, above, result = degenerate.reshape(-1), image.reshape(-1), blended.reshape(-1)
    buffers = np.empty((2, min(_VALUES, image.size)), np.float32)
    for begin in range(0, image.size, _VALUES):
        part = slice(begin, begin + _VALUES)
        base, value = buffers[:, : image.size - begin]
        base[:] = below[part]
        value[:] = above[part]
        value -= base
        value *= np.float32(factor)
        value += base
        if factor > 1:
            np.clip(value, 0, 255, out=value)
        result[part] = value
    return blended


def _luma(image: Image) -> Image:
    # (19595 r + 38470 g + 7471 b + 32768) >> 16: each of these integers is below 2**24, so float32 is exact.
    weights = np.array([[19595, 38470, 7471, 32768]], np.float32) / np.float32(65536)
    luma = np.empty(image.shape[:2], np.uint8)
    for top in range(0, len(image), _ROWS):
        rows = slice(top, top + _ROWS)
        luma[rows] = cv2.transform(image[rows].astype(np.float32), weights)
    return luma


def _translate(axis: int, image: Image, magnitude: float, random: Random) -> Image:
    length = image.shape[axis]
    shift = math.floor(magnitude * length + 0.5)  # from target to source
    moved = np.full_like(image, _GREY)
    to, source = np.moveaxis(moved, axis, 0), np.moveaxis(image, axis, 0)
    to[max(0, -shift) : length - max(0, shift)] = source[max(0, shift) : length + min(0, shift)]
    return moved


def _rotate(image: Image, magnitude: float, random: Random) -> Image:
    return _gather(image, _rotation(*image.shape[:2], magnitude), cv2.BORDER_CONSTANT)


def _gather(image: Image, positions: NDArray[np.int16], border: int) -> Image:
    """Return the pixels at the given columns and rows; a constant border is grey."""
    whole: Any = None  # no second map with fractions; OpenCV's stubs do not know that it may be None
    colour = (_GREY, _GREY, _GREY)
    return _image(cv2.remap(image, positions, whole, cv2.INTER_NEAREST, borderMode=border, borderValue=colour))


@functools.lru_cache(maxsize=32)
def _rotation(height: int, width: int, degrees: float) -> NDArray[np.int16]:
    """Source column and row of each pixel, [height, width, 2], in Pillow's 16.16 fixed point."""
    angle = -math.radians(degrees)
    cosine, sine = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x_0 = cosine * (-width / 2) + sine * (-height / 2) + width / 2
    y_0 = -sine * (-width / 2) + cosine * (-height / 2) + height / 2

    def fixed(value: float) -> int:
        return math.floor(value * 65536 + 0.5)

    x, y = np.arange(width), np.arange(height)[:, None]
    positions = np.empty((height, width, 2), np.int16)
    positions[..., 0] = (fixed(x_0 + cosine * 0.5 + sine * 0.5) + x * fixed(cosine) + y * fixed(sine)) >> 16
    positions[..., 1] = (fixed(y_0 - sine * 0.5 + cosine * 0.5) + x * fixed(-sine) + y * fixed(cosine)) >> 16
    return positions


def _shear_x(image: Image, magnitude: float, random: Random) -> Image:
    """Shift each row by its own fraction of a pixel, with Pillow's cubic interpolation of four neighbours.

    Pillow's ``Image.transform`` uses the cubic with a = -1 (its ``resize`` -0.5, OpenCV -0.75), computes in float64 and
    truncates. The cubic's coefficients are sums of a few bytes, hence exact as int16.
    """
    height, width = image.shape[:2]
    positions, fractions, outside = _shearing(height, width, magnitude)
    sheared = np.empty(image.shape, np.uint8)
    grey = np.full((min(_ROWS, height), width, 3), _GREY, np.uint8)
    values = np.zeros((3, min(_ROWS, height) * (width + 3)), np.float64)
    for top in range(0, height, _ROWS):
        rows, left = slice(top, top + _ROWS), min(_ROWS, height - top)
        near = np.stack(cv2.split(_gather(image, positions[rows], cv2.BORDER_REPLICATE)), dtype=np.int16)
        # All rows of a channel as one, which is faster; values that mix two rows are cut away again.
        count = left * (width + 3) - 3
        v_1, v_2, v_3, v_4 = (near.reshape(3, -1)[:, tap : tap + count] for tap in range(4))
        fraction, value = fractions[rows].reshape(-1)[:count], values[:, :count]
        difference, curve = v_2 - v_1, v_3 - v_4
        np.multiply(difference - curve, fraction, out=value)
        value += curve - difference - difference
        value *= fraction
        value += v_3 - v_1
        value *= fraction
        value += v_2
        whole = values[:, : count + 3].astype(np.int16)
        part = np.clip(whole, 0, 255, out=whole).astype(np.uint8).reshape(3, left, -1)[..., :width]
        sheared[rows] = cv2.copyTo(grey[:left], outside[rows], cv2.merge(list(part)))
    return sheared


def _shear_y(image: Image, magnitude: float, random: Random) -> Image:
    return _image(cv2.transpose(_shear_x(_image(cv2.transpose(image)), magnitude, random)))


@functools.lru_cache(maxsize=32)
def _shearing(height: int, width: int, slope: float) -> tuple[NDArray[np.int16], NDArray[np.float64], Image]:
    """Locate each pixel's four neighbours, its distance past the second of them, and which pixels lie outside.

    Returns:
        Column and row, [height, width + 3, 2]: the neighbours of pixel x are entries x to x + 3.
        The fraction, [height, width + 3], the last three unused; a rounding error may make it 1 or just below 0.
        1 where the pixel is outside, else 0, [height, width].
    """
    x, y = np.arange(width) + 0.5, np.arange(height)[:, None] + 0.5
    source = x + slope * y
    whole = np.floor(source - 0.5).astype(np.int64) - np.arange(width)
    shift = np.median(whole, axis=1).astype(np.int64)[:, None]  # the same within a row, up to rounding errors
    positions = np.empty((height, width + 3, 2), np.int16)
    positions[..., 0] = np.clip(np.arange(width + 3) - 1 + shift, 0, width - 1)
    positions[..., 1] = np.arange(height)[:, None]
    fractions = np.zeros((height, width + 3))
    fractions[:, :width] = source - 0.5 - (np.arange(width) + shift)
    return positions, fractions, ((source < 0) | (source >= width)).astype(np.uint8)


def _cutout_square(image: Image, magnitude: float, random: Random) -> Image:
    (height, width), half = image.shape[:2], int(magnitude) // 2
    x, y = _integer(random, width), _integer(random, height)
    cut = image.copy()
    _fill(cut, x - half, y - half, x + half, y + half, _SQUARE_COLOUR)
    return cut


def _fill(image: Image, left: int, top: int, right: int, bottom: int, colour: tuple[int, int, int]) -> None:
    image[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = colour


def _integer(random: Random, count: int) -> int:
    return int(random.random() * count)


def _image(array: Any) -> Image:
    return cast(Image, array)  # OpenCV's stubs leave the dtype open


def _linear(first: float, last: float) -> tuple[float, ...]:
    return tuple(np.linspace(first, last, 10).tolist())


def _rounded(first: float, last: float) -> tuple[float, ...]:
    return tuple(np.round(np.linspace(first, last, 10)).tolist())


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "invert": Operation(_invert, (0.0,) * 10),
        "cutout": Operation(_cutout_square, _rounded(0, 20)),
        "sharpness": Operation(_sharpness, _linear(0, 0.9), signed=True),
        "auto_contrast": Operation(_auto_contrast, (0.0,) * 10),
        "posterize": Operation(_posterize, _rounded(8, 4)),
        "shear_x": Operation(_shear_x, _linear(0, 0.3), signed=True),
        "translate_x": Operation(functools.partial(_translate, 1), _linear(0, 150 / 331), signed=True),
        "translate_y": Operation(functools.partial(_translate, 0), _linear(0, 150 / 331), signed=True),
        "shear_y": Operation(_shear_y, _linear(0, 0.3), signed=True),
        "rotate": Operation(_rotate, _linear(0, 30)),
        "equalize": Operation(_equalize, (0.0,) * 10),
        "contrast": Operation(_contrast, _linear(0, 0.9), signed=True),
        "color": Operation(_color, _linear(0, 0.9), signed=True),
        "solarize": Operation(_solarize, _linear(256, 0)),
        "brightness": Operation(_brightness, _linear(0, 0.9), signed=True),
    }
)
"""RandAugment's operations by name."""
