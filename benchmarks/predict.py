"""Images per second of wn21k_zoo.Predictor against plain timm (model and transform in a loop), and the time of --help.

Same process, same weights, same photographs, rounds interleaved; prints the medians and their ratio. Without --folder
it makes JPEGs of about 100 kB from scikit-image's photographs.

    python benchmarks/predict.py [--folder DIR] [--images 64] [--rounds 5] [--model NAME]
"""

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from PIL import Image

from wn21k_zoo import Predictor


def make_photographs(folder: Path, count: int) -> None:
    import skimage

    data = Path(skimage.__file__).parent / "data"
    sources = [
        data / name for name in ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png")
    ]
    for index in range(count):
        with Image.open(sources[index % len(sources)]) as image:
            square = image.convert("RGB").resize((640 + index % 7, 480), Image.Resampling.BICUBIC)
        square.save(folder / f"{index:04d}.jpg", quality=92)


def plain_timm(module, transform, paths: list[Path]) -> list[int]:
    best = []
    with torch.inference_mode():
        for path in paths:
            with Image.open(path) as image:
                tensor = transform(image.convert("RGB"))
            best.append(int(module(tensor[None]).softmax(-1).argmax()))
    return best


def seconds_of(command: list[str], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begin = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--model", default="efficientnet_lite0.embedded_in1k")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        if arguments.folder is None:
            make_photographs(Path(temporary), arguments.images)
        paths = sorted(path for path in (arguments.folder or Path(temporary)).iterdir() if path.is_file())
        size = sum(path.stat().st_size for path in paths) / len(paths) / 1000
        predictor = Predictor(arguments.model, device="cpu", batch_size=arguments.batch_size)
        # Plain timm: a separate model, in the memory format of timm.create_model.
        module = copy.deepcopy(predictor.module).to(memory_format=torch.contiguous_format)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module), is_training=False)
        ours, theirs = [], []
        for number in range(arguments.rounds + 1):  # the first round warms up
            begin = time.perf_counter()
            predictions = predictor(paths)
            middle = time.perf_counter()
            expected = plain_timm(module, transform, paths)
            end = time.perf_counter()
            if number:
                ours.append(len(paths) / (middle - begin))
                theirs.append(len(paths) / (end - middle))
        agree = sum(prediction.top_k[0].index == best for prediction, best in zip(predictions, expected, strict=True))
    print(
        f"{len(paths)} photographs of {size:.0f} kB, {torch.get_num_threads()} threads, medians of {arguments.rounds}"
    )
    print(f"plain timm loop        {statistics.median(theirs):7.1f} images/s")
    print(f"wn21k_zoo.Predictor    {statistics.median(ours):7.1f} images/s (batch {predictor.batch_size})")
    print(f"ratio                  {statistics.median(ours) / statistics.median(theirs):7.2f}")
    print(f"same top-1             {agree} of {len(paths)}")
    bare = seconds_of([sys.executable, "-c", "pass"], arguments.rounds)
    helping = seconds_of([sys.executable, "-m", "wn21k_zoo", "--help"], arguments.rounds)
    print(f"wn21k --help           {helping:7.2f} s (python -c pass: {bare:.2f} s)")


if __name__ == "__main__":
    main()
