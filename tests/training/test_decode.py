"""What training sees of an image file, beside what a prediction sees of it."""

import contextlib
import io
import sys

import numpy as np
import pytest
from PIL import Image

from wn21k_zoo.images import load_image
from wn21k_zoo.training.decode import UndecodableError, decode

NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)
ORIENTATION = 0x0112


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated(orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return exif


FILES = {
    "JPEG": encoded(Image.fromarray(NOISE[..., :3]), "JPEG"),
    "grey JPEG": encoded(Image.fromarray(NOISE[..., 0]), "JPEG"),
    "CMYK JPEG": encoded(Image.fromarray(NOISE[..., :3]).convert("CMYK"), "JPEG"),
    "PNG": encoded(Image.fromarray(NOISE[..., :3]), "PNG"),
    "transparent PNG": encoded(Image.fromarray(NOISE), "PNG"),
    "transparent WebP": encoded(Image.fromarray(NOISE), "WEBP", lossless=True),
    "palette GIF": encoded(Image.fromarray(NOISE[..., :3]).quantize(16), "GIF"),
    "16-bit PNG": encoded(Image.fromarray(NOISE[..., 0].astype(np.uint16) * 200), "PNG"),
    **{
        f"{kind} rotated {number}": encoded(Image.fromarray(NOISE[..., :3]), kind, exif=rotated(number))
        for kind in ("JPEG", "PNG", "WEBP")
        for number in (1, 2, 3, 6, 8)
    },
    "JPEG rotated by XMP": encoded(
        Image.fromarray(NOISE[..., :3]), "JPEG", xmp=b"<x><tiff:Orientation>6</tiff:Orientation></x>"
    ),
    "JPEG with damaged EXIF": encoded(Image.fromarray(NOISE[..., :3]), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 8),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", FILES)
def test_it_is_what_a_prediction_sees(name):
    pixels = decode(FILES[name])
    assert pixels.flags.writeable
    expected = np.asarray(load_image(FILES[name]))
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=int(name == "CMYK JPEG"))  # rounded otherwise


def test_upright_photographs_do_not_take_the_slow_way(monkeypatch):
    monkeypatch.setattr("wn21k_zoo.training.decode.load_image", None)
    for name in ("JPEG", "grey JPEG", "JPEG rotated 1"):
        assert decode(FILES[name]).shape == (20, 30, 3)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "is empty"),
        (b"no image at all", "is not an image"),
        (FILES["JPEG"][:-200], "truncated"),
        (FILES["JPEG rotated 6"][:-200], "truncated"),
        (FILES["PNG"][:-200], "truncated or damaged"),
        (FILES["JPEG"][:200] + b"\xff\xd9", "cannot be decoded"),
    ],
)
def test_what_is_no_image_says_why(data, why):
    with pytest.raises(UndecodableError, match=why):
        decode(data)


def test_of_a_cut_animation_no_part_ends_a_run():
    frames = [Image.fromarray(NOISE[..., number]) for number in range(4)]
    whole = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for length in range(0, len(whole), 7):
        with contextlib.suppress(UndecodableError):
            decode(whole[:length])


def test_a_photograph_that_needs_an_extra_is_one_bad_sample(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UndecodableError, match=r"wn21k-zoo\[heif\]"):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))


def test_a_whole_jpeg_with_a_flaw_counts():
    flawed = bytearray(FILES["JPEG"])
    flawed[-12:-8] = b"\xff\xd4\x00\x00"  # a restart marker where none belongs
    assert decode(bytes(flawed)).shape == (20, 30, 3)
