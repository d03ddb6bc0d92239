"""Images per second and core of `wn21k data prepare` against bare OpenCV decode + resize + encode, in the same run.

JPEGs of 500 pixels and more are made from scikit-image's photographs and packed like fall11_whole.tar, with about as
many images per class as it has on average (12.4 million in 11,221). The bare loop reads the same archive's bytes from
memory, in as many processes as there are workers; both get the same images. Rounds are interleaved; prints medians,
their ratio, and the time that 12.4 million such images would take.

    python benchmarks/prepare.py [--classes 16] [--images 1000] [--rounds 3] [--workers N] [--engine local|ray]
"""

import argparse
import concurrent.futures
import io
import multiprocessing
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.prepare import PrepareOptions, prepare


def photographs(count: int) -> list[bytes]:
    import skimage

    folder = Path(skimage.__file__).parent / "data"
    names = ("chelsea.png", "coffee.png", "rocket.jpg", "astronaut.png", "motorcycle_left.png")
    generator = np.random.default_rng(0)
    found = []
    for index in range(count):
        with Image.open(folder / names[index % len(names)]) as image:
            width = int(generator.integers(500, 640))
            picture = image.convert("RGB").resize(
                (width, int(width * generator.uniform(0.66, 1))), Image.Resampling.BICUBIC
            )
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(generator.integers(85, 96)))
        found.append(file.getvalue())
    return found


def pack(path: Path, classes: int, images: list[bytes]) -> int:
    """Write an archive of class archives, each with all the images; return the total number of images."""
    with tarfile.open(path, "w") as outer:
        for wnid in LabelSpace.load("fall11").wnids[:classes]:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for index, data in enumerate(images):
                    member = tarfile.TarInfo(f"{wnid}_{index}.JPEG")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
            member = tarfile.TarInfo(f"{wnid}.tar")
            member.size = len(inner.getvalue())
            outer.addfile(member, io.BytesIO(inner.getvalue()))
    return classes * len(images)


def bare(images: list[bytes]) -> float:
    cv2.setNumThreads(1)
    begin = time.perf_counter()
    for data in images:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
        cv2.imencode(".jpg", cv2.resize(pixels, (224, 224)), [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=16)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    arguments = parser.parse_args()
    workers = arguments.workers
    distinct = photographs(min(arguments.images, 200))
    # Each is a separate copy: bytes that are already in the CPU cache would flatter the bare loop.
    images = [bytes(bytearray(distinct[index % len(distinct)])) for index in range(arguments.images)]
    ours, theirs, classes_pass = [], [], []
    with tempfile.TemporaryDirectory() as temporary:
        source, output = Path(temporary) / "whole.tar", Path(temporary) / "out"
        count = pack(source, arguments.classes, images)
        options = PrepareOptions(min_images=0, val_per_class=10)
        pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
        list(pool.map(bare, [images[:5]] * workers))
        for _ in range(arguments.rounds):
            seconds = sum(pool.map(bare, [images] * arguments.classes))  # without the time to send them the bytes
            theirs.append(count / seconds * workers)
            marks: list[tuple[float, str, int]] = []
            begin = time.perf_counter()
            prepare(
                source,
                output,
                options,
                workers=workers,
                engine=arguments.engine,
                progress=lambda progress, marks=marks: marks.append(
                    (time.perf_counter(), progress.stage, progress.images)
                ),
            )
            ours.append(count / (time.perf_counter() - begin))
            # The speed between the first finished class and the last: that of a long run.
            steps = [(at, images) for at, stage, images in marks if stage == "classes" and images]
            first, last = steps[0], steps[-1]
            classes_pass.append((last[1] - first[1]) / (last[0] - first[0]))
            shutil.rmtree(output)
        pool.shutdown()
    size = sum(map(len, images)) / len(images) / 1000
    print(
        f"{count} JPEGs of {size:.0f} kB, {workers} workers, engine {arguments.engine}, medians of {arguments.rounds}"
    )
    print(f"bare OpenCV                    {statistics.median(theirs) / workers:7.0f} images/s/core")
    for name, speeds in (("prepare, first to last class", classes_pass), ("prepare, all of it", ours)):
        speed = statistics.median(speeds)
        print(f"{name:30s} {speed / workers:7.0f} images/s/core, ratio {speed / statistics.median(theirs):.2f}")
    hours = 12.4e6 / (statistics.median(classes_pass) / workers) / 3600
    print(f"12.4 million such images: {hours:.1f} core hours, {hours / 32:.1f} h on 32 such cores")


if __name__ == "__main__":
    main()
