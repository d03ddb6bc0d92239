"""Single images, for other libraries' loaders."""

import errno
import io
import os
import pickle

import numpy as np
import pytest
import timm.data
import torch
from PIL import Image
from torch.utils.data import DataLoader

from wn21k_zoo.errors import BadImagesError, DataError, InvalidArgumentError
from wn21k_zoo.training.data import Loader, Squash, TorchDataset, open_dataset, open_folder
from wn21k_zoo.training.dataset import _TarImages
from wn21k_zoo.training.open_shards import OpenShards

from .loading import SIZE, loader
from .runs import make_folder


def to_tensor(image):
    assert image.mode == "RGB"
    return torch.from_numpy(np.array(image.resize((SIZE, SIZE)))).permute(2, 0, 1)


@pytest.fixture(params=["shards", "folder"])
def dataset(request, shards, tmp_path):
    return open_dataset(shards) if request.param == "shards" else open_folder(make_folder(tmp_path / "images"))


def test_images_and_targets_are_those_of_the_loader(dataset):
    one_by_one = TorchDataset(dataset)
    assert len(one_by_one) == len(dataset)
    for batch in Loader(dataset, batch_size=9, training=False, augmentation=Squash(SIZE)):
        images, targets = batch
        assert (images is batch.images, targets is batch.targets) == (True, True)
        for sample, target, expected in zip(batch.samples.tolist(), targets.tolist(), images, strict=True):
            image, index = one_by_one[sample]
            assert isinstance(image, Image.Image)
            assert index == target
            found = Squash(SIZE)(np.array(image), None)
            assert np.array_equal(found, (expected * 255).round().permute(1, 2, 0).numpy())


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_own_loader_takes_them(dataset, workers):
    one_by_one = TorchDataset(dataset, to_tensor)
    expected = [each[1] for each in one_by_one]  # so processes fork while shards are open
    found = list(DataLoader(one_by_one, batch_size=8, num_workers=workers))
    assert [target for _, targets in found for target in targets] == expected
    assert sum(len(targets) for _, targets in found) == len(dataset)
    assert {images.shape[1:] for images, _ in found} == {(3, SIZE, SIZE)}


def test_timms_loader_takes_them(dataset):
    one = timm.data.create_loader(
        TorchDataset(dataset), (3, SIZE, SIZE), 8, is_training=True, num_workers=0, use_prefetcher=False
    )
    images, targets = next(iter(one))
    assert (images.shape, targets.shape) == ((8, 3, SIZE, SIZE), (8,))


def test_numbers_are_those_of_a_sequence(dataset):
    one = pickle.loads(pickle.dumps(TorchDataset(dataset)))  # noqa: S301
    assert np.array_equal(np.array(one[-1][0]), np.array(one[np.int64(len(one) - 1)][0]))
    for number in (len(one), -len(one) - 1):
        with pytest.raises(IndexError, match="none has the index"):
            one[number]
    with pytest.raises(TypeError):
        one["0"]
    assert len(list(one)) == len(one)


def test_a_damaged_image_is_named(damaged, tmp_path):
    folder, names = damaged
    one = TorchDataset(open_dataset(folder))
    with pytest.raises(BadImagesError, match="is damaged"):
        list(one)
    (folder / names[0][0]).unlink()
    with pytest.raises(DataError):
        list(one)
    photos = make_folder(tmp_path / "images")
    broken = min(photos.rglob("*.jpg"))
    broken.write_bytes(b"x")
    with pytest.raises(BadImagesError, match=broken.name):
        list(TorchDataset(open_folder(photos, "all")))


def test_batches_unpack(shards):
    for images, targets in loader(shards):
        assert len(images) == len(targets) == 8


def test_what_was_read_from_last_stays_open(shards, monkeypatch):
    dataset, opened = open_dataset(shards), []
    monkeypatch.setattr(type(dataset), "open", lambda self, number: opened.append(number) or (io.BytesIO(), number))
    one = OpenShards(dataset, 2)
    for number in (0, 1, 0, 2, 0, 1):
        assert one[number][1] == number
    assert opened == [0, 1, 2, 1]


@pytest.mark.parametrize("failures", [1, 2])
def test_a_read_that_fails_is_tried_once_more(shards, monkeypatch, failures):
    dataset, opened, failed = open_dataset(shards), [], []
    opening, read = type(dataset).open, _TarImages.read

    def stale(self, offset, size):
        if len(failed) < failures:
            failed.append(1)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return read(self, offset, size)

    monkeypatch.setattr(type(dataset), "open", lambda self, number: opened.append(number) or opening(self, number))
    monkeypatch.setattr(_TarImages, "read", stale)
    one = Loader(dataset, batch_size=8, training=False, augmentation=Squash(SIZE), max_bad=1.0)
    assert sum(len(batch) for batch in one) + one.bad_samples == len(dataset)
    assert (one.bad_samples, opened[:2]) == (failures - 1, [0, 0])


def test_a_shard_that_cannot_be_opened_is_one_line(shards, monkeypatch):
    def refused(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "train-00000.tar")

    monkeypatch.setattr(_TarImages, "__init__", refused)
    with pytest.raises(DataError, match=r"The shard .*train-00000\.tar cannot be opened: .*Permission denied"):
        next(iter(loader(shards)))


def test_a_fork_opens_shards_of_its_own(shards, monkeypatch):
    dataset, opened = open_dataset(shards), []
    monkeypatch.setattr(type(dataset), "open", lambda self, number: opened.append(number) or (io.BytesIO(), number))
    one = OpenShards(dataset, 2)
    assert one[0][1] == 0
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert one[0][1] == 0
    assert opened == [0, 0]


def test_torchvisions_names(shards, tmp_path):
    folder = open_folder(make_folder(tmp_path / "images", images=4), "all")
    for dataset in (open_dataset(shards), folder):
        one = TorchDataset(dataset)
        assert one.classes == dataset.class_names
        assert one.targets.tolist() == [target for _, target in one]
        assert repr(one).startswith(f"TorchDataset({type(dataset).__name__}(")


@pytest.mark.parametrize("taker", [TorchDataset, lambda dataset: Loader(dataset, batch_size=1)])
def test_what_is_no_data_set_of_ours(taker):
    with pytest.raises(InvalidArgumentError, match=r"takes what open_dataset or open_folder returns, .*'shards'"):
        taker("shards")
    with pytest.raises(InvalidArgumentError, match="not list"):
        taker([1])
