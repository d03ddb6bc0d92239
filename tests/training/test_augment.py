"""Every operation against one built from Pillow's functions; the geometry, the random draws and the pipeline."""

# ruff: noqa: S311

import pickle
import platform
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

pytest.importorskip("cv2")
data = pytest.importorskip("skimage.data")

from wn21k_zoo.errors import InvalidArgumentError  # noqa: E402
from wn21k_zoo.training import augment  # noqa: E402
from wn21k_zoo.training.augment import OPERATIONS, PublishedAugmentation, Squash, cutout, resize  # noqa: E402

GREY = (128, 128, 128)
CASES = [
    (name, index, sign)
    for name, operation in OPERATIONS.items()
    for index in range(1, 10)
    for sign in ((1, -1) if operation.signed else (1,))
]


def affine(image, *matrix, resample=Image.Resampling.NEAREST):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=GREY)


def rotate(image, degrees):
    turned = image.convert("RGBA").rotate(degrees)
    return Image.composite(turned, Image.new("RGBA", turned.size, (128,) * 4), turned).convert("RGB")


def square(image, size, source):
    width, height = image.size
    x, y, half = int(source.random() * width), int(source.random() * height), int(size) // 2
    image = image.copy()
    for column in range(max(0, x - half), min(width, x + half)):
        for row in range(max(0, y - half), min(height, y + half)):
            image.putpixel((column, row), (125, 122, 113))
    return image


BICUBIC = Image.Resampling.BICUBIC
LINEAR = {
    "sharpness": (0, 0.9),
    "contrast": (0, 0.9),
    "color": (0, 0.9),
    "brightness": (0, 0.9),
    "shear_x": (0, 0.3),
    "shear_y": (0, 0.3),
    "translate_x": (0, 150 / 331),
    "translate_y": (0, 150 / 331),
    "rotate": (0, 30),
    "solarize": (256, 0),
}
ROUNDED = {"posterize": (8, 4), "cutout": (0, 20)}
PILLOW = {
    "invert": lambda image, m, _: ImageOps.invert(image),
    "cutout": square,
    "sharpness": lambda image, m, _: ImageEnhance.Sharpness(image).enhance(1 + m),
    "auto_contrast": lambda image, m, _: ImageOps.autocontrast(image),
    "posterize": lambda image, m, _: ImageOps.posterize(image, int(m)),
    "shear_x": lambda image, m, _: affine(image, 1, m, 0, 0, 1, 0, resample=BICUBIC),
    "translate_x": lambda image, m, _: affine(image, 1, 0, m * image.width, 0, 1, 0),
    "translate_y": lambda image, m, _: affine(image, 1, 0, 0, 0, 1, m * image.height),
    "shear_y": lambda image, m, _: affine(image, 1, 0, 0, m, 1, 0, resample=BICUBIC),
    "rotate": lambda image, m, _: rotate(image, m),
    "equalize": lambda image, m, _: ImageOps.equalize(image),
    "contrast": lambda image, m, _: ImageEnhance.Contrast(image).enhance(1 + m),
    "color": lambda image, m, _: ImageEnhance.Color(image).enhance(1 + m),
    "solarize": lambda image, m, _: ImageOps.solarize(image, m),
    "brightness": lambda image, m, _: ImageEnhance.Brightness(image).enhance(1 + m),
}
# Pillow's binaries for these machines fuse multiply and add, with one rounding instead of two.
FUSED = platform.machine().lower() in ("arm64", "aarch64")
ALLOWED = dict.fromkeys(PILLOW, 0)
"""Greatest difference in levels."""
ALLOWED |= dict.fromkeys(("sharpness", "contrast", "color", "brightness", "shear_x", "shear_y"), int(FUSED))


def magnitude_of(name, index):
    if name in ROUNDED:
        return np.round(np.linspace(*ROUNDED[name], 10))[index]
    return np.linspace(*LINEAR.get(name, (0, 0)), 10)[index]


@pytest.fixture(scope="module")
def images():
    noise = np.random.default_rng(0)
    found = {
        "chelsea": resize(data.chelsea(), 224, 224),
        "astronaut": resize(data.astronaut(), 224, 224),
        "noise": noise.integers(0, 256, (224, 224, 3), np.uint8),
        "two values": noise.choice(np.array([3, 250], np.uint8), (64, 64, 3)),
        "constant": np.full((40, 40, 3), (7, 128, 255), np.uint8),
        "wide": noise.integers(0, 256, (17, 45, 3), np.uint8),
        "tall": resize(data.chelsea(), 64, 64)[:, :21].copy(),
        "tiny": noise.integers(0, 256, (2, 1, 3), np.uint8),
    }
    for image in found.values():
        image.flags.writeable = False  # operations that write to their input fail
    return found


@pytest.mark.parametrize(("name", "index", "sign"), CASES)
def test_operation_is_pillows(images, name, index, sign):
    operation = OPERATIONS[name]
    assert operation.magnitudes[index] == magnitude_of(name, index)
    for label, image in images.items():
        magnitude = sign * operation.magnitudes[index]
        ours = operation.function(image, magnitude, random.Random(index))
        theirs = PILLOW[name](Image.fromarray(image), sign * magnitude_of(name, index), random.Random(index))
        assert ours.dtype == np.uint8
        assert ours.shape == image.shape
        assert not np.shares_memory(ours, image)
        difference = np.abs(ours.astype(int) - np.asarray(theirs)).max()
        assert difference <= ALLOWED[name], (label, difference)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (3, 3), (5, 4), (7, 8), (224, 224), (9, 31)])
def test_cutout_is_imagedraws_rectangle(size):
    width, height = size
    half_width, half_height = int(0.5 * width + 0.5) // 2, int(0.5 * height + 0.5) // 2
    columns = {0, 1, half_width, width // 2, width - 1 - half_width, width - 2, width - 1}
    rows = {0, 1, half_height, height // 2, height - 1 - half_height, height - 2, height - 1}
    for x in columns & set(range(width)):
        for y in rows & set(range(height)):
            ours = np.zeros((height, width, 3), np.uint8)
            cutout(ours, (x, y), (1, 2, 3))
            theirs = Image.new("RGB", size)
            left, right = np.clip([x - half_width, x + half_width], 0, width).tolist()
            top, bottom = np.clip([y - half_height, y + half_height], 0, height).tolist()
            ImageDraw.Draw(theirs).rectangle((left, top, right, bottom), fill=(1, 2, 3))
            np.testing.assert_array_equal(ours, np.asarray(theirs))


def test_cutout_inside_an_image_of_224_pixels_is_113_wide():
    image = np.zeros((224, 224, 3), np.uint8)
    cutout(image, (112, 112), (255, 255, 255))
    assert image.any(axis=2).sum() == 113 * 113


def test_same_state_gives_the_same_image(images):
    augmentation = PublishedAugmentation()
    for seed in range(30):
        once = augmentation(images["chelsea"], random.Random(seed))
        again = augmentation(images["chelsea"], random.Random(seed))
        np.testing.assert_array_equal(once, again)
    others = {augmentation(images["chelsea"], random.Random(seed)).tobytes() for seed in range(30)}
    assert len(others) == 30


def test_input_stays_as_it_is(images):
    for image in images.values():
        mine = image.copy()  # writable, so only the augmentation itself protects it
        for seed in range(60):
            found = PublishedAugmentation(mine.shape[0])(mine, random.Random(seed))
            assert not np.shares_memory(found, mine)
            np.testing.assert_array_equal(mine, image)


def test_what_is_augmented_is_squashed_first(images):
    image = images["wide"]
    squashed = resize(image, 32, 32)
    for seed in range(20):
        expected = PublishedAugmentation(32)(squashed, random.Random(seed))
        np.testing.assert_array_equal(PublishedAugmentation(32)(image, random.Random(seed)), expected)


@pytest.fixture
def recorded(monkeypatch):
    """Operations that change nothing and record how they were called."""
    calls = []

    def stub(name):
        def function(image, magnitude, source):
            calls.append((name, magnitude))
            return image

        # Each magnitude is its index, even where the real ones repeat.
        return augment.Operation(function, tuple(float(index) for index in range(10)), OPERATIONS[name].signed)

    stubs = {name: stub(name) for name in OPERATIONS}
    monkeypatch.setattr(augment, "OPERATIONS", stubs)
    return calls


def test_operations_and_magnitudes_are_uniform(recorded):
    count, source = 27_000, random.Random(3)
    image, per_image = np.zeros((2, 2, 3), np.uint8), Counter()
    for _ in range(count):
        before = len(recorded)
        PublishedAugmentation(2)(image, source)
        per_image[len(recorded) - before] += 1
    # Each of two with probability 0.5, independently; bounds are five standard deviations.
    for number, share in ((0, 0.25), (1, 0.5), (2, 0.25)):
        assert abs(per_image[number] - share * count) < 5 * (share * (1 - share) * count) ** 0.5
    pairs = Counter((name, abs(magnitude)) for name, magnitude in recorded)
    assert set(pairs) == {(name, float(index)) for name in OPERATIONS for index in range(1, 10)}
    expected = count / 135
    assert max(abs(number - expected) for number in pairs.values()) < 5 * expected**0.5
    negative = Counter(name for name, magnitude in recorded if magnitude < 0)
    assert set(negative) == {name for name, operation in OPERATIONS.items() if operation.signed}
    names = Counter(name for name, _ in recorded)
    for name, number in negative.items():
        assert abs(number - names[name] / 2) < 5 * (names[name] / 4) ** 0.5


def test_cutout_is_uniform(monkeypatch):
    calls = []
    monkeypatch.setattr(augment, "cutout", lambda image, centre, colour: calls.append((*centre, *colour)))
    source = random.Random(0)
    for _ in range(20_000):
        PublishedAugmentation(4)(np.zeros((4, 4, 3), np.uint8), source)
    drawn = np.array(calls)
    cells = Counter(zip(*drawn[:, :2].T.tolist(), strict=True))
    assert len(cells) == 16
    assert max(abs(number - 1250) for number in cells.values()) < 5 * 1250**0.5
    assert drawn[:, 2:].min(axis=0).tolist() == [0, 0, 0]
    assert drawn[:, 2:].max(axis=0).tolist() == [255, 255, 255]
    np.testing.assert_allclose(drawn[:, 2:].mean(axis=0), 127.5, atol=5 * 73.9 / 20_000**0.5)
    assert np.abs(np.corrcoef(drawn[:, 2:].T) - np.eye(3)).max() < 5 / 20_000**0.5


def test_the_fifteen_published_operations():
    assert set(OPERATIONS) == set(PILLOW)
    assert len(OPERATIONS) == 15
    signed = {"shear_x", "shear_y", "translate_x", "translate_y", "color", "contrast", "brightness", "sharpness"}
    assert {name for name, operation in OPERATIONS.items() if operation.signed} == signed
    assert all(len(operation.magnitudes) == 10 for operation in OPERATIONS.values())
    assert OPERATIONS["posterize"].magnitudes == (8, 8, 7, 7, 6, 6, 5, 5, 4, 4)
    assert OPERATIONS["cutout"].magnitudes == (0, 2, 4, 7, 9, 11, 13, 16, 18, 20)


@settings(max_examples=60, deadline=None)
@given(
    arrays.arrays(np.uint8, st.tuples(st.integers(1, 20), st.integers(1, 20), st.just(3))),
    st.integers(1, 20),
    st.integers(0, 2**32),
)
def test_any_image_gives_the_shape(image, size, seed):
    for transform in (PublishedAugmentation(size), Squash(size)):
        found = transform(image, random.Random(seed))
        assert found.shape == (size, size, 3)
        assert found.dtype == np.uint8


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3))), st.sampled_from(CASES))
def test_any_image_is_treated_as_by_pillow(image, case):
    name, index, sign = case
    magnitude = sign * OPERATIONS[name].magnitudes[index]
    ours = OPERATIONS[name].function(image, magnitude, random.Random(1))
    theirs = np.asarray(PILLOW[name](Image.fromarray(image), magnitude, random.Random(1)))
    assert np.abs(ours.astype(int) - theirs).max() <= ALLOWED[name]


def test_squash():
    image = resize(data.chelsea(), 224, 224)
    assert resize(image, 224, 224) is image
    source = random.Random(0)
    state = source.getstate()
    assert Squash()(image, source) is image
    assert source.getstate() == state
    ramp = np.repeat(np.arange(0, 200, 40, dtype=np.uint8)[None, :, None], 3, axis=2)
    assert resize(ramp, 10, 10)[0, :, 0].tolist() == [0, 10, 30, 50, 70, 90, 110, 130, 150, 160]


@pytest.mark.parametrize("kind", [Squash, PublishedAugmentation])
def test_size_is_checked_when_made(kind):
    for size in (0, -1, 2.5, "224", None):
        with pytest.raises(InvalidArgumentError, match="it must be a whole number, 1 or more"):
            kind(size)
    assert pickle.loads(pickle.dumps(kind(96))) == kind(96)  # noqa: S301
    assert kind().size == 224


def by_pillow(image, size, source):
    """The published pipeline on Pillow's images, with the draws in the documented order."""
    image = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    x, y = int(source.random() * size), int(source.random() * size)
    colour = tuple(int(source.random() * 256) for _ in range(3))
    half = int(0.5 * size + 0.5) // 2
    ImageDraw.Draw(image).rectangle((x - half, y - half, x + half, y + half), fill=colour)
    for _ in range(2):
        name, index = list(PILLOW)[int(source.random() * 15)], 1 + int(source.random() * 9)
        if source.random() < 0.5:
            magnitude = magnitude_of(name, index)
            if OPERATIONS[name].signed and source.random() < 0.5:
                magnitude = -magnitude
            image = PILLOW[name](image, magnitude, source)
    return np.asarray(image)


def test_the_whole_is_pillows():
    image = data.chelsea()
    for seed in range(100):
        ours = PublishedAugmentation(64)(image, random.Random(seed))
        theirs = by_pillow(image, 64, random.Random(seed))
        # Later operations, such as equalize, can turn a difference of one level into several.
        assert np.mean(ours != theirs) <= 0.01 * FUSED, seed
