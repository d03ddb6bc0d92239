"""Random and central crops: their shapes, and that they are drawn as in torchvision."""

# ruff: noqa: S311

from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import RandomErasing, RandomResizedCrop

stats = pytest.importorskip("scipy.stats")
cv2 = pytest.importorskip("cv2")

from wn21k_zoo.training import crops  # noqa: E402
from wn21k_zoo.training.augment import OPERATIONS, Operation, Squash  # noqa: E402
from wn21k_zoo.training.crops import CenterCrop, RandomCrop  # noqa: E402

COUNT = 4000


def assert_alike(ours, theirs):
    """Top, left, height and width of many rectangles, all from the same distribution."""
    ours, theirs = np.array(ours), np.array(theirs)
    for of in (
        lambda each: each[:, 2] * each[:, 3],
        lambda each: each[:, 3] / each[:, 2],
        *(lambda each, column=column: each[:, column] for column in range(4)),
    ):
        assert stats.ks_2samp(of(ours), of(theirs)).pvalue > 1e-3


@pytest.mark.parametrize(("shape", "scale"), [((300, 300), 0.08), ((200, 500), 0.25), ((375, 250), 0.08)])
def test_crops_are_drawn_as_by_torchvision(monkeypatch, shape, scale):
    part, drawn, source = crops._part, [], Random(0)
    monkeypatch.setattr(crops, "_part", lambda *given: drawn.append(part(*given)) or drawn[-1])
    crop, image = RandomCrop(8, scale=scale), np.zeros((*shape, 3), np.uint8)
    for _ in range(COUNT):
        crop(image, source)
    torch.manual_seed(0)
    pixels = torch.zeros(3, *shape)
    assert_alike(drawn, [RandomResizedCrop.get_params(pixels, (scale, 1), (3 / 4, 4 / 3)) for _ in range(COUNT)])


def test_erased_rectangles_are_drawn_as_by_torchvision():
    ours, source, image = [], Random(1), np.zeros((96, 96, 3), np.uint8)
    crop = RandomCrop(96, scale=1.0, erase=1.0)
    while len(ours) < COUNT / 2:
        rows, columns = np.nonzero(crop(image, source).any(2))
        if len(rows):  # noise of one value is improbable
            ours.append((rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1))
    torch.manual_seed(0)
    pixels = torch.zeros(3, 96, 96)
    theirs = [RandomErasing.get_params(pixels, (0.02, 1 / 3), (0.3, 1 / 0.3), [0.0])[:4] for _ in range(COUNT)]
    assert_alike(ours, theirs)


def test_a_quarter_is_erased_by_noise_and_half_are_flipped():
    source, erased, flipped = Random(2), 0, 0
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32, 0] = 255  # with the crop, the left is brighter than the right
    for _ in range(COUNT):
        found = RandomCrop(16, scale=1.0, erase=0.25)(image, source)
        erased += bool(found[:, :, 1].any())
        flipped += not found[:, :, 1].any() and found[:, -1, 0].mean() > found[:, 0, 0].mean()
    assert abs(erased - COUNT / 4) < 5 * (COUNT * 3 / 16) ** 0.5
    assert abs(flipped - COUNT * 3 / 8) < 5 * (COUNT * 15 / 64) ** 0.5


def test_two_operations_are_drawn_uniformly_with_uniform_magnitudes(monkeypatch):
    calls = []

    def stub(name):
        def function(image, magnitude, source):
            calls.append((name, abs(magnitude)))
            return image

        return Operation(function, tuple(float(index) for index in range(10)), OPERATIONS[name].signed)

    monkeypatch.setattr(crops, "OPERATIONS", {name: stub(name) for name in OPERATIONS})
    source, image = Random(3), np.zeros((4, 4, 3), np.uint8)
    count = 13_500
    for _ in range(count):
        RandomCrop(4, operations=2)(image, source)
    assert len(calls) == 2 * count
    pairs, expected = Counter(calls), 2 * count / 135
    assert set(pairs) == {(name, float(index)) for name in OPERATIONS for index in range(1, 10)}
    assert max(abs(number - expected) for number in pairs.values()) < 5 * expected**0.5


@pytest.mark.parametrize("shape", [(40, 60, 3), (60, 40, 3), (64, 64, 3), (20, 20, 3), (1, 90, 3)])
@pytest.mark.parametrize("options", [{}, {"operations": 2, "erase": 1.0}])
def test_random_crops_have_their_size_and_depend_on_the_seed_alone(shape, options):
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    before = image.copy()
    crop = RandomCrop(32, **options)
    results = [crop(image, Random(seed)) for seed in (1, 1, 2)]
    assert all(result.shape == (32, 32, 3) and result.dtype == np.uint8 for result in results)
    assert np.array_equal(results[0], results[1])
    assert shape[0] == 1 or not np.array_equal(results[0], results[2])
    assert np.array_equal(image, before)


@pytest.mark.parametrize("shape", [(40, 60, 3), (60, 40, 3), (64, 64, 3), (20, 20, 3)])
def test_the_centre_stays_in_the_centre(shape):
    image = np.zeros(shape, np.uint8)
    image[shape[0] // 2 - 2 : shape[0] // 2 + 2, shape[1] // 2 - 2 : shape[1] // 2 + 2] = 255
    cropped = CenterCrop(32)(image, Random(0))
    assert cropped.shape == (32, 32, 3)
    rows, columns = np.nonzero(cropped[:, :, 0] > 100)
    assert abs(rows.mean() - 15.5) < 1.1
    assert abs(columns.mean() - 15.5) < 1.1


@pytest.mark.parametrize("crop_pct", [None, 0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("shape", [(375, 500), (500, 333), (480, 481), (64, 64), (40, 90), (512, 512), (73, 73)])
def test_evaluation_resizes_as_timm_does(shape, crop_pct):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    transform = create_transform(
        (3, 64, 64), interpolation="bilinear", crop_pct=crop_pct or 1.0,
        crop_mode="center" if crop_pct else "squash", use_prefetcher=True,
    )  # fmt: skip
    theirs = np.asarray(transform(Image.fromarray(image))).transpose(1, 2, 0)
    ours = (CenterCrop(64, crop_pct) if crop_pct else Squash(64))(image, Random(0))
    np.testing.assert_array_equal(ours, theirs)


def test_crops_out_of_range():
    for make in (lambda: RandomCrop(0), lambda: RandomCrop(8, scale=0), lambda: CenterCrop(8, crop_pct=2)):
        with pytest.raises(ValueError, match="must be"):
            make()


def test_what_is_made_smaller_is_averaged_and_what_is_made_larger_is_smooth():
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    means = image.reshape(16, 4, 16, 4, 3).mean((1, 3))
    steps = np.repeat(np.array([[0, 200]], np.uint8), 2, 0)[..., None].repeat(3, 2)
    for seed in range(4):
        found = RandomCrop(16, scale=1.0)(image, Random(seed))
        assert min(np.abs(each - means).max() for each in (found, found[:, ::-1])) <= 1
        assert len(np.unique(RandomCrop(16, scale=1.0)(steps, Random(seed)))) > 2


@pytest.mark.parametrize("shape", [(64, 8), (8, 64)])
def test_a_part_that_is_smaller_in_one_direction_is_averaged_there(monkeypatch, shape):
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    monkeypatch.setattr(crops, "_part", lambda *_: (0, 0, *shape))
    found = RandomCrop(16)(image, Random(3))
    ways = [cv2.resize(image, (16, 16), interpolation=way) for way in (cv2.INTER_AREA, cv2.INTER_LINEAR)]
    same = [any(np.array_equal(found, each) for each in (way, way[:, ::-1])) for way in ways]
    assert same == [True, False]


def test_what_is_erased_is_noise_of_its_own():
    crop, image = RandomCrop(96, scale=1.0, erase=1.0), np.zeros((96, 96, 3), np.uint8)
    erased = [found[found.any(2)] for found in (crop(image, Random(seed)) for seed in range(60))]
    erased = [each for each in erased if len(each)]
    assert len({tuple(each[0].tolist()) for each in erased}) == len(erased)
    assert all(each.std(0).min() > 60 for each in erased)
    noise = np.concatenate(erased)
    np.testing.assert_allclose(noise.mean(0), 127.5, atol=1)
    assert noise.max() == 255


def test_a_crop_may_touch_every_edge():
    drawn = [crops._rectangle((10, 12), (0.25, 0.25), (1.0, 1.0), Random(seed)) for seed in range(1000)]
    assert {(tall, wide) for *_, tall, wide in drawn} == {(5, 5)}
    assert {top for top, *_ in drawn} == set(range(6))
    assert {left for _, left, *_ in drawn} == set(range(8))


@pytest.mark.parametrize(("size", "crop_pct"), [(224, 0.9), (384, 0.95), (64, 0.93)])
def test_evaluation_resizes_as_timm_at_224(size, crop_pct):
    image = np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)
    transform = create_transform(
        (3, size, size), interpolation="bilinear", crop_pct=crop_pct, crop_mode="center", use_prefetcher=True
    )
    theirs = np.asarray(transform(Image.fromarray(image))).transpose(1, 2, 0)
    np.testing.assert_array_equal(CenterCrop(size, crop_pct)(image, Random(0)), theirs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RandomCrop(8, erase=1.5), lambda: RandomCrop(8, erase=-0.1), lambda: RandomCrop(8, operations=-1),
        lambda: RandomCrop(8, scale=1.5), lambda: CenterCrop(8, crop_pct=0.0), lambda: CenterCrop(0),
    ],
)  # fmt: skip
def test_numbers_that_no_crop_has(make):
    with pytest.raises(ValueError, match="must be"):
        make()
