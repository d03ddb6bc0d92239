"""Images per second and core of the training loader, compared with its parts and with torchvision's ImageFolder.

224 pixel JPEGs of about 23 kB are cut from scikit-image's photographs and stored both as shards and as loose files.
Each round measures in turn, in one process and thread: bare decoding by three decoders; the published augmentation
alone; batches of the loader as its workers make them; the same with the conversion to numbers in [0, 1], which for a
GPU happens on the GPU; and torchvision's ImageFolder with the same transforms by Pillow. Then both with worker
processes. Prints medians.

    python benchmarks/loader.py [--images 2000] [--rounds 5] [--workers 2] [--batch-size 64]
"""

import argparse
import collections
import io
import random
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

sys.path.insert(0, str(Path(__file__).resolve().parent))
from augment import pillow_augmentation, seconds_of

from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.data import Loader, PublishedAugmentation, open_dataset
from wn21k_zoo.training.prepare import PrepareOptions, prepare

SIZE = 224


def make_images(count: int) -> list[bytes]:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    names = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png")
    photographs = [Image.open(folder / name).convert("RGB") for name in names]
    generator, found = np.random.default_rng(0), []
    for index in range(count):
        photograph = photographs[index % len(photographs)]
        side = int(generator.integers(250, min(photograph.size)))
        left, top = (int(generator.integers(0, length - side + 1)) for length in photograph.size)
        cut = photograph.crop((left, top, left + side, top + side)).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        file = io.BytesIO()
        cut.save(file, "JPEG", quality=95)
        found.append(file.getvalue())
    return found


class PillowTransform:
    """The published transforms on Pillow images."""

    def __init__(self) -> None:
        self.tensor = transforms.ToTensor()

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return self.tensor(pillow_augmentation(image, SIZE, random))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    images = make_images(arguments.images)
    count = len(images) // arguments.batch_size * arguments.batch_size
    with tempfile.TemporaryDirectory() as temporary:
        loose = Path(temporary) / "loose"
        wnids = LabelSpace.load("fall11").wnids[:10]
        for index, data in enumerate(images):
            path = loose / wnids[index % 10] / f"{wnids[index % 10]}_{index}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        shards = Path(temporary) / "shards"
        # A size above the images': they are copied as they are, so both read the same bytes.
        options = PrepareOptions(min_images=0, val_per_class=0, shard_size=500, size=SIZE + 1)
        prepare(loose, shards, options, workers=1)
        dataset = open_dataset(shards)
        augmentation = PublishedAugmentation(SIZE)
        pixels = [simplejpeg.decode_jpeg(data, "RGB") for data in images]
        ours = Loader(dataset, batch_size=arguments.batch_size)
        folder = DataLoader(
            ImageFolder(str(loose), PillowTransform()), arguments.batch_size, shuffle=True, drop_last=True
        )
        with_workers = {
            "loader": Loader(dataset, batch_size=arguments.batch_size, workers=arguments.workers),
            "ImageFolder": DataLoader(
                folder.dataset,
                arguments.batch_size,
                shuffle=True,
                drop_last=True,
                num_workers=arguments.workers,
                persistent_workers=True,
            ),
        }
        generator = random.Random(0)  # noqa: S311
        todo = {
            "decode, simplejpeg": (lambda: [simplejpeg.decode_jpeg(data, "RGB") for data in images], len(images)),
            "decode, OpenCV": (lambda: [cv2.imdecode(np.frombuffer(d, np.uint8), 1) for d in images], len(images)),
            "decode, Pillow": (lambda: [np.asarray(Image.open(io.BytesIO(d))) for d in images], len(images)),
            "augment": (lambda: [augmentation(one, generator) for one in pixels], len(images)),
            "loader, batches of bytes": (lambda: collections.deque(ours._batches, 0), count),
            "loader, to [0, 1] as well": (lambda: collections.deque(ours, 0), count),
            "ImageFolder, Pillow": (lambda: collections.deque(folder, 0), count),
            **{
                f"{name}, {arguments.workers} workers": (lambda loader=loader: collections.deque(loader, 0), count)
                for name, loader in with_workers.items()
            },
        }
        seconds: dict[str, list[float]] = {name: [] for name in todo}
        for number in range(arguments.rounds + 1):
            for name, (function, samples) in todo.items():
                took = seconds_of(function) / samples
                if number:  # the first round warms up
                    seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    size = sum(map(len, images)) / len(images) / 1000
    print(
        f"{len(images)} JPEGs of {size:.0f} kB, batches of {arguments.batch_size}, medians of {arguments.rounds} rounds"
    )
    for name, took in medians.items():
        print(f"{name:28} {1 / took:8.0f} images/s")
    parts = medians["decode, simplejpeg"] + medians["augment"]
    for name in ("loader, batches of bytes", "loader, to [0, 1] as well"):
        print(f"{name}: {parts / medians[name]:.2f} of 1 / (t_decode + t_augment), "
              f"{medians['ImageFolder, Pillow'] / medians[name]:.2f} times ImageFolder")  # fmt: skip
    several = [medians[f"{name}, {arguments.workers} workers"] for name in ("ImageFolder", "loader")]
    print(f"with {arguments.workers} workers: {several[0] / several[1]:.2f} times ImageFolder")


if __name__ == "__main__":
    main()
