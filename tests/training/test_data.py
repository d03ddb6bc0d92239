import contextlib
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import types
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torchvision.transforms import v2

from wn21k_zoo.errors import BadImagesError, DataError, ImageTooLargeError, InvalidArgumentError
from wn21k_zoo.labels import LabelSpace
from wn21k_zoo.training.data import Loader, Squash, open_dataset, open_folder
from wn21k_zoo.training.options import PrepareOptions
from wn21k_zoo.training.shards import read_info
from wn21k_zoo.training.workers import allow_open_files, randomness, warn_of_main

from .archives import WNIDS, jpeg
from .loading import SIZE, Noisy, batches, loader, same
from .ranks import run_rank
from .runs import make_folder


def test_a_batch_is_what_was_stored(shards):
    dataset = open_dataset(shards, "validation")
    space = LabelSpace.load("fall11")
    assert dataset.label_space.digest == space.digest
    found = batches(Loader(dataset, batch_size=3, training=False, augmentation=Squash(SIZE)))
    assert [len(one[0]) for one in found] == [3, 3, 2]
    path, index = dataset.local(0)
    whole = path.read_bytes()
    for samples, targets, images in found:
        assert images.dtype == torch.float32
        assert images.shape[1:] == (3, SIZE, SIZE)
        assert images.is_contiguous(memory_format=torch.channels_last)
        for sample, target, image in zip(samples, targets, images, strict=True):
            entry = index[sample]
            assert target == entry["target"]
            assert space.wnids[target] in WNIDS
            data = whole[entry["offset"] : entry["offset"] + entry["size"]]
            expected = Squash(SIZE)(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")), None)
            assert np.abs(np.asarray(expected) / 255 - image.permute(1, 2, 0).numpy()).max() < 1e-6


def test_samples_have_their_own_targets_and_evaluation_their_own_order(shards):
    dataset = open_dataset(shards)
    targets = np.concatenate([dataset.index(number)["target"] for number in range(len(dataset.lengths))])
    for training in (True, False):
        found = batches(loader(shards, training=training))
        samples = [sample for one in found for sample in one[0]]
        assert targets[samples].tolist() == [target for one in found for target in one[1]]
        assert len(set(samples)) == len(samples) == (64 if training else 67)
        assert (samples == sorted(samples)) == (not training)


def test_randomness_is_what_it_has_always_been():
    """A run resumed with another version continues with the same crops."""
    assert randomness(1, 2, 3).random() == 0.26713145990474474


def test_randomness_has_seed_epoch_and_sample_apart():
    drawn = [
        randomness(*numbers).random() for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1))
    ]
    assert len(set(drawn)) == len(drawn)


def test_what_is_left_of_an_epoch_and_less_than_a_step_is_left_out(shards):
    one = loader(shards, batch_size=5, accumulation=3)
    assert sum(1 for _ in one) == len(one) == 67 // 15 * 3
    with pytest.raises(InvalidArgumentError, match="5 x 1 x 14"):
        loader(shards, batch_size=5, accumulation=14)


def test_some_samples_of_an_evaluation_come_from_all_shards(shards):
    ranks = [
        batches(loader(shards, training=False, batch_size=4, rank=rank, world_size=2, limit=16)) for rank in range(2)
    ]
    assert [len(batch[0]) for rank in ranks for batch in rank] == [4] * 4
    assert sorted(sample for rank in ranks for batch in rank for sample in batch[0]) == [
        place * 67 // 16 for place in range(16)
    ]
    with pytest.raises(InvalidArgumentError, match="limit is for evaluation"):
        loader(shards, limit=16)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(shards, workers):
    here, there = loader(shards, seed=7), loader(shards, seed=7, workers=workers)
    for _ in range(2):  # the second epoch with the same processes
        same(batches(here), batches(there))
    assert here.state_dict() == there.state_dict() == {"epoch": 2, "samples_seen": 0}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_the_same_samples(shards, world):
    whole = [one for batch in batches(loader(shards, batch_size=2 * world)) for one in batch[0]]
    ranks = [batches(loader(shards, batch_size=2, rank=rank, world_size=world)) for rank in range(world)]
    assert len({len(rank) for rank in ranks}) == 1
    assert [one for step in zip(*ranks, strict=True) for batch in step for one in batch[0]] == whole
    assert len(ranks[0]) == len(loader(shards, batch_size=2, rank=0, world_size=world))


@pytest.mark.parametrize(("before", "after", "workers"), [(1, 1, 0), (1, 1, 2), (4, 1, 0), (1, 3, 0), (2, 3, 2)])
def test_it_goes_on_where_it_was_also_with_other_ranks(shards, before, after, workers):
    first = [loader(shards, batch_size=3, rank=rank, world_size=before, workers=workers) for rank in range(before)]
    seen, states = [], []
    for one in first:
        batches(one)  # epoch 0
        for step, batch in enumerate(one):
            seen += zip(batch.samples.tolist(), batch.images[:, :, 0, 0].tolist(), strict=True)
            if step == 2:
                break
        states.append(one.state_dict())
    assert all(state == states[0] for state in states)
    assert states[0] == {"epoch": 1, "samples_seen": 9 * before}
    rest = []
    for rank in range(after):
        one = loader(shards, batch_size=3, rank=rank, world_size=after, workers=workers)
        one.load_state_dict(json.loads(json.dumps(states[0])))
        for batch in one:
            rest += zip(batch.samples.tolist(), batch.images[:, :, 0, 0].tolist(), strict=True)
        assert one.state_dict() == {"epoch": 2, "samples_seen": 0}
    whole = loader(shards, batch_size=1)
    whole.load_state_dict({"epoch": 1, "samples_seen": 0})
    expected = [(batch.samples.item(), batch.images[0, :, 0, 0].tolist()) for batch in whole]
    left = len(expected) - len(seen)
    assert sorted(seen) == sorted(expected[: len(seen)])
    assert sorted(rest) == sorted(expected[len(seen) : len(seen) + left // (3 * after) * 3 * after])


def test_augmentation_is_a_function_of_seed_epoch_and_sample(shards):
    def drawn(one):
        return {
            s: tuple(i[:, 0, 0].tolist())
            for batch in one
            for s, i in zip(batch.samples.tolist(), batch.images, strict=True)
        }

    again = loader(shards, batch_size=1, seed=1)
    first, second = drawn(again), drawn(again)
    assert first == drawn(loader(shards, batch_size=1, seed=1, window=1, workers=2))
    assert sum(first[sample] == second[sample] for sample in first) < 3
    assert sum(first[sample] == other for sample, other in drawn(loader(shards, batch_size=1, seed=2)).items()) < 3


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_evaluation_has_each_sample_once_over_all_ranks(shards, world, batch_size):
    ranks = [
        batches(loader(shards, "validation", batch_size=batch_size, rank=r, world_size=world)) for r in range(world)
    ]
    assert sorted(one for rank in ranks for batch in rank for one in batch[0]) == list(range(8))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_sample_is_counted_logged_and_left_out_without_another_rank_waiting(damaged, workers, caplog):
    folder, names = damaged
    ranks = [loader(folder, batch_size=2, rank=rank, world_size=2, workers=workers, seed=1) for rank in range(2)]
    found = [batches(one) for one in ranks]
    assert len(found[0]) == len(found[1])
    good = sum(len(batch[0]) for rank in found for batch in rank)
    bad = sum(one.bad_samples for one in ranks)
    assert bad == 2
    assert good + bad == len(found[0]) * 4
    messages = [record.getMessage() for record in caplog.records]
    for shard, name in names:
        assert any(shard in message and name in message for message in messages)


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_get_to_the_end(damaged, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (damaged[0], tmp_path / "store")
    ranks = [context.Process(target=run_rank, args=(*arguments, rank, 2, results)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = [results.get(timeout=100) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert {total for _, total, _ in found} == {62.0}  # of 64 in whole batches
    assert sum(bad for *_, bad in found) == 2


@pytest.mark.parametrize(
    ("bad", "seen", "world_size", "max_bad", "ends"),
    [
        (10, 10, 1, 0.01, False),  # ten are always allowed
        (11, 1100, 1, 0.01, False),  # as 40 of 4,000 are allowed
        (41, 1100, 1, 0.01, True),
        (5, 600, 1, 0.002, False),  # 8 of 4,000
        (5, 600, 2, 0.002, True),  # 4 of the half that a rank has
        (4, 600, 2, 0.002, False),
        (300, 599, 1, 0.5, False),
        (499, 1000, 1, 0.5, False),
        (501, 1000, 1, 0.5, True),
    ],
)
def test_how_many_may_be_damaged(shards, bad, seen, world_size, max_bad, ends):
    one = loader(shards, batch_size=1, world_size=world_size, max_bad=max_bad)
    one.num_samples = 4000
    raw = {"bad": [("shard", str(number), "no image") for number in range(bad)], "targets": range(seen - bad)}
    with pytest.raises(BadImagesError) if ends else contextlib.nullcontext():
        one._count(raw)
    assert one.bad_samples == bad


@dataclass(frozen=True)
class Failing:
    error: type[Exception]

    def __call__(self, image, random):
        if random.random() < 0.1:
            raise self.error("this image")
        return Squash(SIZE)(image, random)


@pytest.mark.parametrize("error", [OSError, cv2.error, ImageTooLargeError])
def test_a_file_that_cannot_be_read_or_changed_is_a_bad_sample(shards, error):
    one = loader(shards, augmentation=Failing(error))
    assert sum(len(batch) for batch in one) + one.bad_samples == 64
    assert one.bad_samples


def test_a_batch_of_damaged_images_has_the_shape_of_others(tmp_path):
    make_folder(tmp_path, images=2, names=WNIDS)
    for image in tmp_path.rglob("*.jpg"):
        image.write_bytes(b"no image")
    (tmp_path / WNIDS[0] / "good.jpg").write_bytes(jpeg(0))
    empty = Loader(open_folder(tmp_path, "all"), batch_size=1, augmentation=Squash(SIZE), max_bad=1)
    shapes = {tuple(batch.images.shape) for batch in empty}
    assert shapes == {(0, 3, SIZE, SIZE), (1, 3, SIZE, SIZE)}
    cropped = Loader(open_folder(tmp_path, "all"), batch_size=1, augmentation=crop, max_bad=1)
    assert {tuple(batch.images.shape) for batch in cropped} == {(0, 3, 35, 35), (1, 3, 35, 35)}


def crop(image, random):
    row = random.randrange(image.shape[0] - 34)
    return image[row : row + 35, :35].copy()


@pytest.mark.parametrize(
    "made", [lambda: timm.data.create_transform(32), lambda: v2.Compose([v2.ToImage()]), lambda: str.upper]
)
def test_a_transform_of_images_alone_is_no_augmentation(shards, made):
    with pytest.raises(InvalidArgumentError, match="use TorchDataset with torch's DataLoader"):
        loader(shards, augmentation=made())


def test_too_many_damaged_samples_end_it(damaged):
    folder, _ = damaged
    with pytest.raises(BadImagesError, match=r"Raise max_bad .*it continues.*wn21k data verify"):
        batches(loader(folder, batch_size=4, max_bad=0.001, seed=1))


def test_a_look_at_a_batch_costs_an_evaluation_nothing(shards):
    looked_at = Loader(open_dataset(shards, "validation"), batch_size=3, training=False)
    next(iter(looked_at))
    assert sum(map(len, looked_at)) == sum(map(len, looked_at)) == 8
    looked_at.load_state_dict({"epoch": 0, "samples_seen": 6})
    assert sum(map(len, looked_at)) == 2


@pytest.mark.parametrize("workers", [0, 2])
def test_who_counts_batches_misses_no_epoch(shards, workers):
    """Other trainers take ``len`` batches and never ask for one more."""
    counting, asking = loader(shards, workers=workers), loader(shards)
    for epoch in range(3):
        same(batches(islice(counting, len(counting))), batches(asking))
        assert counting.state_dict()["epoch"] == epoch
    going_on = loader(shards)
    going_on.load_state_dict(counting.state_dict())
    same(batches(going_on), batches(asking))


def test_what_cannot_be_is_refused(shards, tmp_path):
    dataset = open_dataset(shards)
    for wrong in ({"batch_size": 0}, {"batch_size": 1, "rank": 1}, {"batch_size": 100}, {"batch_size": 1, "seed": -1}):
        with pytest.raises(InvalidArgumentError):
            Loader(dataset, **wrong)
    with pytest.raises(InvalidArgumentError, match=r"such as open_dataset\('shards'\)"):
        Loader("shards", batch_size=1)
    with pytest.raises(InvalidArgumentError, match="not TensorDataset"):
        Loader(torch.utils.data.TensorDataset(torch.zeros(4)), batch_size=1)
    for wrong in ({"device": "x"}, {"device": 1.5}, {"augmentation": "published"}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            Loader(dataset, batch_size=1, **wrong)
    with pytest.raises(InvalidArgumentError, match="is not a state"):
        loader(shards).load_state_dict({"epoch": 0, "samples_seen": 10**6})
    for place, split, message in (
        (tmp_path / "nothing", "train", "does not exist"),
        (shards / "_info.json", "train", "is a file"),
        (shards, "validaton", "Did you mean validation"),
        (tmp_path, "train", "no shards"),
        ("nosuch://bucket/folder", "train", "cannot be reached"),
        ("ftp://127.0.0.1:9/folder", "train", "cannot be reached"),
        ("http://127.0.0.1:9/folder", "train", "or is not reachable"),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(place, split)
    (tmp_path / "missing").mkdir()
    shutil.copy(shards / "_info.json", tmp_path / "missing")
    with pytest.raises(DataError, match=r"train-00000\.tar is missing; copy it again"):
        open_dataset(tmp_path / "missing")
    shutil.copytree(shards, tmp_path / "short")
    last = max((tmp_path / "short").glob("train-*.tar"))
    os.truncate(last, last.stat().st_size - 512)
    with pytest.raises(DataError, match=rf"{last.name} has [\d,]+ bytes, but had [\d,]+ when it was written"):
        open_dataset(tmp_path / "short")
    open_dataset(tmp_path / "short", "validation")  # whose shards are whole


def test_a_data_set_can_be_pickled(shards):
    dataset = open_dataset(shards)
    assert pickle.loads(pickle.dumps(dataset)) == dataset  # noqa: S301
    assert "67 samples in 7 shards" in repr(dataset)


def test_classes_are_mapped_by_synset(shards, tmp_path):
    classes = LabelSpace("mine", (WNIDS[1], "n02121808"))
    (tmp_path / "mine.txt").write_text("".join(f"{wnid}\n" for wnid in classes))
    assert len(open_dataset(shards, label_space=str(tmp_path / "mine.txt"))) == 33
    dataset = open_dataset(shards, label_space=classes)
    assert len(dataset) == 33
    assert {
        one for batch in Loader(dataset, batch_size=11, augmentation=Noisy()) for one in batch.targets.tolist()
    } == {0}
    with pytest.raises(DataError, match="no sample has a class"):
        open_dataset(shards, label_space=LabelSpace("others", ("n02121808",)))


TIMM = """
import sys
from timm.data import create_dataset
for split in ("train", "validation"):
    dataset = create_dataset("wds/", root=sys.argv[1], split=split, is_training=False, batch_size=4)
    found = sorted((target, image.size) for image, target in dataset)
    print(len(found) == len(dataset), found)
"""
WEBDATASET = """
import glob, sys, webdataset
for split in ("train", "validation"):
    urls = sorted(glob.glob(f"{sys.argv[1]}/{split}-*.tar"))
    read = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("jpg", "cls", "json")
    print(True, sorted((target, image.size) for image, target, details in read if details["label"] == target))
"""
DATASETS = """
import sys, datasets
datasets.disable_progress_bars()
for split in ("train", "validation"):
    rows = datasets.load_dataset(sys.argv[1], split=split)
    print(True, sorted((row["cls"], row["jpg"].size) for row in rows))
"""


@pytest.mark.slow
@pytest.mark.parametrize("reader", [TIMM, WEBDATASET, DATASETS], ids=["timm", "webdataset", "datasets"])
def test_the_readers_of_others_read_the_shards(shards, tmp_path, reader):
    lines = []
    for split in ("train", "validation"):
        expected = []
        for shard in read_info(shards).splits[split]:
            with tarfile.open(shards / shard.name) as archive:
                files = {member.name: archive.extractfile(member).read() for member in archive}
            for name in files:
                if name.endswith(".jpg"):
                    with Image.open(io.BytesIO(files[name])) as image:
                        expected.append((int(files[name.replace("jpg", "cls")]), image.size))
        lines.append(f"True {sorted(expected)}")
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", reader, str(shards)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == lines


MASKS = """
import multiprocessing, signal, sys
from pathlib import Path
from wn21k_zoo.training.data import Loader, Squash, open_dataset

BITS = 1 << signal.SIGINT - 1 | 1 << signal.SIGTERM - 1

def blocked(status):
    line = next(line for line in status.read_text().splitlines() if line.startswith("SigBlk"))
    return int(line.split()[1], 16) & BITS

def hears(pid="self"):
    if not blocked(Path(f"/proc/{pid}/status")):
        return "main"
    masks = [blocked(status) for status in Path(f"/proc/{pid}/task").glob("*/status")]
    return "waiter" if masks.count(BITS) == len(masks) - 1 else masks

def own(results):
    results.put(hears())

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    batches = iter(Loader(open_dataset(sys.argv[1]), batch_size=4, augmentation=Squash(32), workers=1))
    next(batches)
    (worker,) = multiprocessing.active_children()
    results = multiprocessing.Queue()
    other = multiprocessing.Process(target=own, args=(results,))
    other.start()
    print(hears(worker.pid), results.get(), hears())
    other.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc says which signals are blocked")
@pytest.mark.parametrize("start_method", ["fork", "forkserver", "spawn"])
def test_processes_that_are_not_a_loaders_hear_signals(shards, tmp_path, start_method):
    script = tmp_path / "masks.py"
    script.write_text(MASKS)
    done = subprocess.run([sys.executable, script, shards, start_method], capture_output=True, text=True, check=False)
    assert done.stdout == "waiter main main\n", done.stderr


LOADS_UNDER_FIRE = """
import multiprocessing, signal, subprocess, sys
import psutil
from wn21k_zoo.training.data import Loader, Squash, open_dataset

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    loader = Loader(open_dataset(sys.argv[1]), batch_size=1, workers=1, augmentation=Squash(32))
    count = 0
    for batch in loader:
        count += 1
        if count == 2:
            (worker,) = [
                each for each in psutil.Process().children(recursive=True)
                if not each.children() and "resource_tracker" not in " ".join(each.cmdline())
            ]
            for number in (signal.SIGINT, signal.SIGTERM):  # not from here: the word of this process counts
                kill = f"import os; os.kill({worker.pid}, {int(number)})"
                subprocess.run([sys.executable, "-c", kill], check=True)
    print(count, len(loader))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="signals cannot be waited for here")
@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_workers_end_on_the_word_of_their_process_alone(shards, tmp_path, method):
    (tmp_path / "script.py").write_text(LOADS_UNDER_FIRE)
    command = [sys.executable, str(tmp_path / "script.py"), str(shards), method]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    count, expected = done.stdout.split()
    assert count == expected != "2"


def test_numbers_of_numpy_are_those_of_python(shards):
    numbers = {"batch_size": np.int64(8), "seed": np.int32(3), "window": np.int64(2), "max_bad": np.float32(0.5)}
    same(batches(loader(shards, batch_size=8, seed=3, window=2)), batches(loader(shards, **numbers)))
    for wrong in (
        {"batch_size": 2.5},
        {"seed": "3"},
        {"window": True},
        {"max_bad": True},
        {"rank": 1},
        {"workers": None},
    ):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            loader(shards, **wrong)


def test_options_of_numpys_numbers_can_be_recorded():
    assert json.dumps(PrepareOptions(size=np.int64(128)).recorded()) == json.dumps(PrepareOptions(size=128).recorded())


def test_a_program_that_processes_may_run_anew_is_told(tmp_path, monkeypatch, caplog):
    main, told = types.ModuleType("__main__"), []
    main.__file__ = str(tmp_path / "main.py")
    monkeypatch.setitem(sys.modules, "__main__", main)
    for method, spec, text in (
        ("spawn", None, None),  # no such file
        ("spawn", None, "train()"),
        ("spawn", object(), "train()"),  # python -m
        ("fork", None, "train()"),
        ("spawn", None, 'if __name__ == "__main__":\n    train()'),
    ):
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda method=method: method)
        main.__spec__ = spec
        if text is not None:
            Path(main.__file__).write_text(text)
        caplog.clear()
        warn_of_main.__wrapped__()
        told.append("main.py; if they end, or nothing happens, put what it runs under" in caplog.text)
    assert told == [False, True, False, False, False]


def test_many_files_may_be_open():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))  # as on macOS
        allow_open_files()
        hard = 4096 if before[1] == resource.RLIM_INFINITY else before[1]
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == min(4096, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    if before[0] >= 4096 or before[0] == resource.RLIM_INFINITY:
        allow_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == before


def test_closed_it_has_no_processes_and_starts_new_ones_where_it_was(shards):
    one = loader(shards, batch_size=3, workers=2)
    one.close()
    before = set(multiprocessing.active_children())
    begun = iter(one)
    seen = next(begun).samples.tolist()
    assert len(set(multiprocessing.active_children()) - before) == 2
    one.close()
    assert set(multiprocessing.active_children()) == before
    with pytest.raises(DataError, match="was closed in the middle of an epoch"):
        next(begun)
    assert seen + [sample for batch in one for sample in batch.samples.tolist()] == [
        sample for batch in loader(shards, batch_size=3) for sample in batch.samples.tolist()
    ]


def test_a_process_that_ends_as_it_begins_is_one_line(shards, monkeypatch):
    one = loader(shards, workers=1)

    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(torch.utils.data.DataLoader, "__iter__", broken)
    with pytest.raises(DataError, match="A process that loads images is gone"):
        next(iter(one))
