import contextlib
import io
import os
import pathlib
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from wn21k_zoo import images
from wn21k_zoo.errors import (
    ImageDecodeError,
    ImageNotFoundError,
    ImageTooLargeError,
    ImageURLError,
    MissingExtraError,
    UnsupportedImageError,
)
from wn21k_zoo.images import FORMATS, IMAGE_SUFFIXES, AnimatedImageWarning, load_image, orientation_of

RED = np.zeros((8, 12, 3), np.uint8)
RED[..., 0] = 255


def saved(image, file_format, **options):
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixel(image, place=(0, 0)):
    assert image.mode == "RGB"
    return image.getpixel(place)


def test_every_form_gives_the_same_pixels(photographs):
    path = photographs[0]
    expected = np.asarray(Image.open(path).convert("RGB"))
    tensor = torch.from_numpy(expected.copy()).permute(2, 0, 1)
    with path.open("rb") as file:
        forms = [
            path,
            str(path),
            Image.open(path),
            expected,
            tensor,
            tensor / 255,
            path.read_bytes(),
            file,
            "sample:cat",
        ]
        for form in forms:
            np.testing.assert_array_equal(np.asarray(load_image(form)), expected)
        assert not file.closed
    unseekable = io.BufferedReader(io.BytesIO(path.read_bytes()))
    unseekable.seekable = lambda: False
    np.testing.assert_array_equal(np.asarray(load_image(unseekable)), expected)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "PPM"])
def test_formats(file_format):
    options = {"lossless": True} if file_format == "WEBP" else {}
    red, green, blue = pixel(load_image(saved(Image.fromarray(RED), file_format, **options)))
    assert red > 245
    assert max(green, blue) < 12


def test_exif_rotation():
    image = Image.new("RGB", (12, 8))
    image.putpixel((0, 0), (255, 255, 255))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        loaded = load_image(saved(image, "PNG", exif=exif))
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(saved(image, "PNG", exif=exif))))
        assert loaded.size == ((8, 12) if orientation > 4 else (12, 8))
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(expected))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "AVIF", "TIFF", "XMP"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_what_was_turned_is_not_turned_again(file_format, mode):
    mode = mode if file_format != "JPEG" or mode == "L" else "CMYK"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options = {"exif": exif}
        if file_format == "XMP":
            options = {"xmp": f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()}
        data = saved(Image.new(mode, (12, 8)), "WEBP" if file_format == "XMP" else file_format, **options)
        once = load_image(data)
        assert once.size == ((8, 12) if orientation > 4 else (12, 8))
        assert orientation_of(once) == 1
        assert load_image(once).size == load_image(Image.open(io.BytesIO(saved(once, "PNG")))).size == once.size


def test_sixteen_bits():
    grey = np.array([[0, 257 * 100, 65_535]], np.uint16)
    for form in (
        grey,
        saved(Image.fromarray(grey), "PNG"),
        saved(Image.fromarray(grey), "TIFF"),
        torch.from_numpy(grey),
    ):
        assert [pixel(load_image(form), (x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]
    assert pixel(load_image(grey.astype(">u2")), (1, 0)) == (100, 100, 100)
    with pytest.raises(UnsupportedImageError, match="unknown range"):
        load_image(Image.fromarray(grey.astype(np.int32)))


def tiff(width, height, bits, photometric, data):
    """A TIFF of one grey strip."""
    entries = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(data),
    }
    directory = struct.pack("<H", len(entries)) + b"".join(
        struct.pack("<HHII", tag, 4, 1, number) for tag, number in entries.items()
    )
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory + struct.pack("<I", 0)


@pytest.mark.parametrize(
    ("bits", "data", "is_white_zero"),
    [
        (16, struct.pack("<4H", 0, 65_535, 257 * 100, 0), False),
        (16, struct.pack("<4H", 0, 65_535, 257 * 100, 0), True),
        (12, b"\0\x0f\xff\x64\x60\0", False),  # Pillow does not know the other
    ],
)
def test_grey_of_a_tiff(bits, data, is_white_zero):
    loaded = load_image(tiff(4, 1, bits, 0 if is_white_zero else 1, data))
    expected = [0, 255, 100, 0]
    assert [pixel(loaded, (x, 0))[0] for x in range(4)] == [255 - grey if is_white_zero else grey for grey in expected]


def test_a_transparent_grey_of_sixteen_bits_is_white():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 5, 65_535]], np.uint16)).save(file, "PNG")
    data = file.getvalue()
    at = data.index(b"IDAT") - 4
    chunk = b"tRNS" + struct.pack(">H", 5)
    data = data[:at] + struct.pack(">I", 2) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[at:]
    assert [pixel(load_image(data), (x, 0))[0] for x in range(3)] == [0, 255, 255]


def test_the_fourth_byte_of_a_tga_may_mean_nothing():
    image = Image.new("RGBA", (4, 4), (200, 100, 50, 0))
    assert pixel(load_image(saved(image, "TGA"))) == (200, 100, 50)
    image.putpixel((0, 0), (1, 2, 3, 255))
    assert [pixel(load_image(saved(image, "TGA")), (x, 0)) for x in (0, 1)] == [(1, 2, 3), (255, 255, 255)]


def test_transparency_is_white_and_hides_colour():
    hidden = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert pixel(load_image(hidden)) == (255, 255, 255)
    assert pixel(load_image(saved(hidden, "PNG"))) == (255, 255, 255)
    assert pixel(load_image(np.asarray(hidden))) == (255, 255, 255)
    assert pixel(load_image(Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    assert pixel(load_image(np.zeros((4, 4, 2), np.uint8))) == (255, 255, 255)
    half = pixel(load_image(Image.new("RGBA", (4, 4), (0, 0, 0, 128))))
    assert half == (127, 127, 127)
    palette = Image.new("P", (4, 4))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert pixel(load_image(palette)) == (255, 0, 0)
    assert pixel(load_image(saved(palette, "PNG", transparency=0))) == (255, 255, 255)
    assert pixel(load_image(saved(Image.fromarray(RED), "PNG", transparency=(255, 0, 0)))) == (255, 255, 255)


def test_other_modes():
    assert pixel(load_image(saved(Image.new("CMYK", (4, 4), (0, 0, 0, 0)), "JPEG"))) == (255, 255, 255)
    assert pixel(load_image(Image.new("1", (4, 4), 1))) == (255, 255, 255)
    assert pixel(load_image(Image.new("L", (4, 4), 7))) == (7, 7, 7)
    assert pixel(load_image(np.full((4, 4), True))) == (255, 255, 255)
    assert pixel(load_image(np.full((4, 4, 1), 9, np.uint8))) == (9, 9, 9)
    with pytest.raises(UnsupportedImageError):
        load_image(Image.new("F", (4, 4)))


def test_animation_gives_its_first_frame_and_one_warning():
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "green")]
    content = saved(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with pytest.warns(AnimatedImageWarning) as caught:
        assert pixel(load_image(content)) == (255, 0, 0)
    assert len(caught) == 1


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "TIFF"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated(file_format, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    content = saved(noise, file_format)
    with pytest.raises(ImageDecodeError):
        load_image(content[: int(len(content) * share)])


def test_flipped_bytes_never_leak_another_error():
    content = saved(Image.fromarray(RED), "PNG")
    rng = np.random.default_rng(0)
    for _ in range(200):
        changed = bytearray(content)
        changed[rng.integers(len(changed))] ^= int(rng.integers(1, 256))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                load_image(bytes(changed))
            except (ImageDecodeError, ImageTooLargeError):
                continue


def test_bad_files(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("no image")
    for path, error, words in [
        (tmp_path / "none.jpg", ImageNotFoundError, "no file"),
        (tmp_path, ImageDecodeError, "directory"),
        (tmp_path / "empty.jpg", ImageDecodeError, "empty"),
        (tmp_path / "text.jpg", ImageDecodeError, "not an image"),
        ("a\0b", ImageNotFoundError, "no file"),
        ("x" * 300 + ".jpg", ImageNotFoundError, "no file"),
        (Image.new("RGB", (0, 4)), ImageDecodeError, "no pixels"),
        (b"", ImageDecodeError, "empty"),
        (b"no image", ImageDecodeError, "not an image"),
        (io.StringIO("text"), UnsupportedImageError, "mode 'rb'"),
        ("sample:dog", ImageNotFoundError, "cat, coffee, rocket"),
        ("http://example.org/x.png", ImageURLError, "allow-url"),
        (7, UnsupportedImageError, "int"),
        (None, UnsupportedImageError, "NoneType"),
    ]:
        with pytest.raises(error, match=words) as caught:
            load_image(path)
        assert "\n" not in str(caught.value)
    closed = io.BytesIO(b"x")
    closed.close()
    with pytest.raises(ImageDecodeError):
        load_image(closed)


def tiled_tiff(side):
    """A TIFF of 8 by 8 pixels in one tile of this side."""
    tags = {256: 8, 257: 8, 258: 8, 259: 1, 262: 1, 277: 1, 322: side, 323: side, 324: 200, 325: 64}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)).ljust(200, b"\0") + bytes(side**2)


def test_no_room_is_made_for_an_enormous_tile(monkeypatch):
    assert load_image(tiled_tiff(16)).size == (8, 8)
    monkeypatch.setattr("wn21k_zoo.images.MAX_PIXELS", 255)
    with pytest.raises(ImageTooLargeError, match="megapixels"):
        load_image(tiled_tiff(16))


def test_formats_are_those_of_the_suffixes():
    pytest.importorskip("pillow_heif").register_heif_opener()
    Image.init()
    found = {Image.registered_extensions()[suffix] for suffix in IMAGE_SUFFIXES}
    assert found - {"HEIF"} == set(FORMATS)


@pytest.mark.skipif(os.name == "nt", reason="a program is a script here")
def test_no_image_is_run_as_a_program(tmp_path, monkeypatch):
    (tmp_path / "gs").write_text(f"#!/bin/sh\necho run >> {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # Pillow searches for it only once
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")
    with contextlib.suppress(OSError), Image.open(photo) as image:
        image.load()
    by_pillow = (tmp_path / "ran").read_text()
    for given in (photo, photo.read_bytes()):
        with pytest.raises(ImageDecodeError, match="not an image"):
            load_image(given)
    assert (tmp_path / "ran").read_text() == by_pillow


def test_too_large_is_refused_before_it_is_decoded(monkeypatch):
    def forbidden(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(Image.Image, "load", forbidden)
    for width, height in ((10_001, 10_000), (40_000, 40_000)):
        huge = b"P5 %d %d 255\n" % (width, height)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with pytest.raises(ImageTooLargeError, match="megapixels"):
                load_image(huge)
    with pytest.raises(ImageTooLargeError):
        load_image(np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (10_001, 10_000), (0, 0)))
    with pytest.raises(ImageTooLargeError):
        load_image(torch.zeros(1).expand(3, 10_001, 10_000))


@pytest.mark.parametrize(
    "value",
    [
        np.zeros((3, 20, 30), np.uint8),
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4,), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.int64),
        torch.zeros(5, 4, 4),
        torch.zeros(4),
        torch.full((3, 4, 4), 2.0),
        torch.full((3, 4, 4), -0.5),
        torch.zeros(3, 4, 4, dtype=torch.int64),
    ],
    ids=lambda value: f"{type(value).__name__}-{tuple(value.shape)}-{value.dtype}",
)
def test_arrays_with_no_single_reading(value):
    with pytest.raises(UnsupportedImageError):
        load_image(value)


def test_heif(monkeypatch, tmp_path):
    pytest.importorskip("pillow_heif")
    code = """
import sys, pillow_heif
from PIL import Image
pillow_heif.register_heif_opener()
Image.new("RGB", (64, 64), "red").save(sys.argv[1], "HEIF")
"""  # in a subprocess, so that here only load_image registers the format
    path = tmp_path / "red.heic"
    subprocess.run([sys.executable, "-c", code, path], check=True)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pillow_heif", None)
        without.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])  # another library may add it
        with pytest.raises(MissingExtraError, match="heif"):
            load_image(path)
    assert pixel(load_image(path), (20, 20))[0] > 240
    with pytest.raises(ImageDecodeError):
        load_image(path.read_bytes()[:300])


def test_samples_need_the_extra(monkeypatch):
    monkeypatch.setattr(images, "in_package", lambda package, path: None)
    with pytest.raises(MissingExtraError, match="demo"):
        load_image("sample:cat")


def test_sources():
    assert images.describe_source(pathlib.Path("x.png")) == "x.png"
    assert images.describe_source("sample:cat") == "sample:cat"
    assert images.describe_source(RED) is None


def test_a_file_object_that_must_be_awaited():
    class Upload:
        def __init__(self, seekable):
            self.seekable = seekable

        async def read(self, size=-1):
            return b""

    async def true():
        return True

    for seekable in (lambda: True, lambda: False, true):
        with pytest.raises(UnsupportedImageError, match=r"is read asynchronously; give `await file\.read\(\)`"):
            load_image(Upload(seekable))


def test_an_encoded_image_is_not_repeated():
    for text in ("a" * 100_000, "data:image/png;base64,aaaa"):
        with pytest.raises(ImageNotFoundError, match=r"There is no file '.{20}' \(and [0-9,]+ more characters\)"):
            load_image(text)
