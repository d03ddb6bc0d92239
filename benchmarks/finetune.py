"""Accuracy of fine-tuning on few images, beside a linear probe on the same features.

    python benchmarks/finetune.py ../shared/data/tiny_imagenet_whole.tar.gz

Two data sets of 10 classes with 30 images each: photographs (from a tar of one tar per synset), whose classes the
weights at the beginning have seen, as those of ImageNet-1K, and digits that are drawn here, which they have not. The
weights are those of the extra ``embedded``. The probe is a logistic regression on the pooled features of the centre
crop, with the best of four strengths by the validation images, which is kind to it. All classes have as many validation
images; with ``--rare`` every second one has only so few for training, and logit adjustment is compared.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional as F

from wn21k_zoo import building
from wn21k_zoo.training import presets
from wn21k_zoo.training.data import Loader, open_folder
from wn21k_zoo.training.engine import train
from wn21k_zoo.training.recipe import Recipe
from wn21k_zoo.training.splits import evaluation_resize

START = "efficientnet_lite0.embedded_in1k"
VALIDATION = 50  # images of each class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=30, help="of each class, for training")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rare", type=int, help="images of every second class, for training")
    arguments = parser.parse_args()
    print(f"top-1, {arguments.classes} classes with {arguments.images} images each, {arguments.size} px, {START}")
    with tempfile.TemporaryDirectory() as temporary:
        for name, samples in (("photographs", photographs(arguments)), ("digits", digits(arguments))):
            folder = Path(temporary) / name
            write(samples, folder, arguments.images)
            if arguments.rare is not None:
                for place in sorted((folder / "train").iterdir())[1::2]:
                    for path in sorted(place.iterdir())[arguments.rare :]:
                        path.unlink()
            recipe = presets.finetune(START)
            recipe.data.size = arguments.size
            print(f"{name}, linear probe: {probe(recipe, folder):.1f}", flush=True)
            arms = ("logit adjustment",) if arguments.rare is not None else ("20 epochs", "a frozen backbone")
            for arm in ("finetune", *arms):
                found = []
                for seed in range(arguments.seeds):
                    changed = recipe.model_copy(deep=True)
                    changed.run.seed, changed.run.evaluate_every = seed, 10_000
                    changed.schedule.epochs = 20 if arm == "20 epochs" else changed.schedule.epochs
                    changed.model.freeze_backbone = arm == "a frozen backbone"
                    changed.loss.logit_adjustment = float(arm == "logit adjustment")
                    run = Path(temporary) / f"{name} {arm} {seed}"
                    found.append(train(changed, folder, run, workers=1)["top1"])
                print(f"{name}, {arm}: {', '.join(f'{value:.1f}' for value in found)}", flush=True)


def photographs(arguments: argparse.Namespace) -> Iterator[tuple[str, int, bytes]]:
    """(class, number, file) of the first classes by name."""
    with tarfile.open(arguments.photographs) as outer:
        classes = sorted((member for member in outer if member.isfile()), key=lambda member: member.name)
        for member in classes[: arguments.classes]:
            with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                files = [entry for entry in inner if entry.isfile()][: arguments.images + VALIDATION]
                for number, entry in enumerate(files):
                    yield Path(member.name).stem, number, inner.extractfile(entry).read()


def digits(arguments: argparse.Namespace) -> Iterator[tuple[str, int, bytes]]:
    """The same, of digits of any size, place, angle and colour, in noise."""
    random = np.random.default_rng(0)
    for digit in range(min(10, arguments.classes)):
        for number in range(arguments.images + VALIDATION):
            glyph = Image.new("L", (64, 64))
            font = ImageFont.load_default(int(random.integers(24, 56)))
            ImageDraw.Draw(glyph).text((32, 32), str(digit), 255, font=font, anchor="mm")
            glyph = glyph.rotate(random.uniform(-25, 25), translate=tuple(random.integers(-8, 9, 2).tolist()))
            paper, ink = random.integers(0, 256, (2, 3))
            share = np.asarray(glyph)[..., None] / 255
            pixels = paper * (1 - share) + ink * share + random.normal(0, 30, (64, 64, 3))
            file = io.BytesIO()
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
            yield str(digit), number, file.getvalue()


def write(samples: Iterator[tuple[str, int, bytes]], folder: Path, images: int) -> None:
    for name, number, data in samples:
        path = folder / ("train" if number < images else "val") / f"class_{name}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@torch.no_grad()
def features(recipe: Recipe, folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    network = building.create_model(START).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.model.mean, recipe.model.std))
    found, targets = [], []
    for batch in Loader(
        open_folder(folder, split), batch_size=32, training=False, augmentation=evaluation_resize(recipe)
    ):
        maps = network.forward_features((batch.images - mean) / std)
        found.append(network.forward_head(maps, pre_logits=True))
        targets.append(batch.targets)
    return torch.cat(found).double(), torch.cat(targets)


def probe(recipe: Recipe, folder: Path) -> float:
    inputs, targets = features(recipe, folder, "train")
    held_out, expected = features(recipe, folder, "validation")
    return max(fitted(inputs, targets, held_out, expected, strength) for strength in (0.001, 0.01, 0.1, 1.0))


def fitted(
    inputs: torch.Tensor, targets: torch.Tensor, held_out: torch.Tensor, expected: torch.Tensor, strength: float
) -> float:
    weights = torch.zeros(inputs.shape[1] + 1, int(targets.max()) + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        entropy = F.cross_entropy(inputs @ weights[1:] + weights[0], targets, reduction="sum")
        value = strength * entropy + weights[1:].square().sum() / 2
        value.backward()
        return value

    optimizer.step(loss)
    right = (held_out @ weights[1:] + weights[0]).argmax(1) == expected
    return 100 * right.double().mean().item()


if __name__ == "__main__":
    main()
