"""Time of each operation of wn21k_zoo.training.augment compared with Pillow's, and images per second of all of it.

Same process, one thread, rounds interleaved; prints microseconds per operation, as medians, and their ratio. Each side
works on what its own loader would use, arrays here and Pillow images there, so no conversion is counted. The whole
augmentation draws the same random numbers on both sides; from 256 px, Pillow's resize is part of both.

    python benchmarks/augment.py [--size 224] [--rounds 15] [--images 300]
"""

# ruff: noqa: S311

import argparse
import random
import statistics
import sys
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw
from skimage import data

from wn21k_zoo.training.augment import OPERATIONS, PublishedAugmentation, resize

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.training.test_augment import PILLOW  # the tests prove ours equal to it


def seconds_of(function, *arguments) -> float:
    begin = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - begin


def pillow_square(image: Image.Image, size: float, source: random.Random) -> Image.Image:
    """The tests' cutout, but drawn in one call instead of pixel by pixel."""
    half = int(size) // 2
    x, y = int(source.random() * image.width), int(source.random() * image.height)
    image = image.copy()
    image.paste((125, 122, 113), (max(0, x - half), max(0, y - half), x + half, y + half))
    return image


REFERENCE = {**PILLOW, "cutout": pillow_square}


def pillow_augmentation(image: Image.Image, size: int, source: random.Random) -> Image.Image:
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    x, y, half = int(source.random() * size), int(source.random() * size), int(0.5 * size + 0.5) // 2
    corners = (max(0, x - half), max(0, y - half), min(size, x + half), min(size, y + half))
    ImageDraw.Draw(image).rectangle(corners, fill=tuple(int(source.random() * 256) for _ in range(3)))
    names = tuple(OPERATIONS)
    for _ in range(2):
        name, index = names[int(source.random() * len(names))], 1 + int(source.random() * 9)
        if source.random() < 0.5:
            operation = OPERATIONS[name]
            sign = -1 if operation.signed and source.random() < 0.5 else 1
            image = REFERENCE[name](image, sign * operation.magnitudes[index], source)
    return image


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=int, default=300)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)

    array = resize(data.astronaut(), arguments.size, arguments.size)
    image = Image.fromarray(array)
    print(f"{arguments.size} px, one thread, medians of {arguments.rounds} rounds over all magnitudes and signs")
    print("operation          ours us   Pillow us   ratio")
    for name, operation in OPERATIONS.items():
        ours, theirs = [], []
        for number in range(arguments.rounds + 1):  # the first round warms up
            for index in range(1, 10):
                magnitude = operation.magnitudes[index] * (-1 if operation.signed and (number + index) % 2 else 1)
                mine = seconds_of(operation.function, array, magnitude, random.Random(index))
                other = seconds_of(REFERENCE[name], image, magnitude, random.Random(index))
                if number:
                    ours.append(mine * 1e6)
                    theirs.append(other * 1e6)
        mine, other = statistics.median(ours), statistics.median(theirs)
        print(f"{name:15} {mine:10.1f} {other:11.1f} {other / mine:7.2f}")

    large = resize(data.astronaut(), 256, 256)
    for label, source in (("from 256 px", large), (f"from {arguments.size} px", array)):
        augmentation, photograph = PublishedAugmentation(arguments.size), Image.fromarray(np.ascontiguousarray(source))
        ours, theirs = [], []
        for number in range(arguments.rounds // 3 + 2):
            begin = time.perf_counter()
            state = random.Random(number)
            for _ in range(arguments.images):
                augmentation(source, state)
            middle = time.perf_counter()
            state = random.Random(number)
            for _ in range(arguments.images):
                pillow_augmentation(photograph, arguments.size, state)
            end = time.perf_counter()
            if number:
                ours.append(arguments.images / (middle - begin))
                theirs.append(arguments.images / (end - middle))
        mine, other = statistics.median(ours), statistics.median(theirs)
        print(f"all, {label:12} ours {mine:7.0f} images/s, Pillow {other:7.0f} images/s, ratio {mine / other:.2f}")


if __name__ == "__main__":
    main()
