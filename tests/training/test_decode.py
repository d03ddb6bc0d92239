"""What training sees of an image file, compared with what a prediction sees."""

import contextlib
import io
import struct
import sys

import numpy as np
import pytest
from conftest import EMBEDDED
from PIL import Image

from wn21k_zoo.errors import ImageTooLargeError
from wn21k_zoo.images import load_image
from wn21k_zoo.models import load_model
from wn21k_zoo.training.crops import CenterCrop
from wn21k_zoo.training.decode import decode
from wn21k_zoo.training.encode import BadImageError, store_image
from wn21k_zoo.training.subject import open_subject

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


def odd_exif(orientation):
    """EXIF with a negative width and a resolution in text, which Pillow reads but cannot write."""
    entries = [(0x0100, 9, (-1).to_bytes(4, "little", signed=True)), (ORIENTATION, 3, bytes([orientation, 0, 0, 0]))]
    entries.append((0x011A, 2, b"72\0\0"))
    fields = b"".join(
        tag.to_bytes(2, "little") + kind.to_bytes(2, "little") + (3 if kind == 2 else 1).to_bytes(4, "little") + value
        for tag, kind, value in entries
    )
    return b"Exif\0\0II*\0\x08\0\0\0" + len(entries).to_bytes(2, "little") + fields + bytes(4)


def with_preview(data):
    """A JPEG with another complete JPEG in its metadata."""
    preview = encoded(Image.fromarray(NOISE[:8, :8, :3]), "JPEG")
    return data[:2] + b"\xff\xe2" + (len(preview) + 2).to_bytes(2, "big") + preview + data[2:]


FILM = b"\0\0\0\x18ftypmp42" + bytes(100_000)  # phones append seconds of video to a photograph
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
    "JPEG with a film": with_preview(encoded(Image.fromarray(NOISE[..., :3]), "JPEG")) + FILM,
    "JPEG with fill bytes and a film": b"\xff\xd8\xff" + encoded(Image.fromarray(NOISE[..., :3]), "JPEG")[2:] + FILM,
    "JPEG rotated 6 with a film": encoded(Image.fromarray(NOISE[..., :3]), "JPEG", exif=rotated(6)) + FILM,
    "JPEG rotated 6 with odd EXIF": encoded(Image.fromarray(NOISE[..., :3]), "JPEG", exif=odd_exif(6)),
    "JPEG with damaged EXIF": encoded(Image.fromarray(NOISE[..., :3]), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 8),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", FILES)
def test_it_is_what_a_prediction_sees(name):
    pixels = decode(FILES[name])
    assert pixels.flags.writeable
    expected = np.asarray(load_image(FILES[name]))
    np.testing.assert_allclose(pixels, expected, rtol=0, atol=int(name == "CMYK JPEG"))  # rounded differently


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", [name for name in FILES if "XMP" not in name])  # which OpenCV does not read
def test_what_a_prediction_takes_is_stored(name):
    height, width = np.asarray(load_image(FILES[name])).shape[:2]
    stored = store_image(FILES[name], 500, "squash", 95)
    assert decode(stored.data).shape == (height, width, 3) == (stored.stored_height, stored.stored_width, 3)
    assert len(stored.data) < 5000  # the video is gone
    if stored.action == "copied":
        assert FILES[name].startswith(stored.data)


@pytest.mark.parametrize("resize", ["squash", "short-edge", "none"])
def test_a_very_long_image(resize):
    data = encoded(Image.new("RGB", (60_000, 2)), "PNG")
    pixels = decode(data)
    loaded = load_model(EMBEDDED)
    own = open_subject(loaded.module, "best", "imagenet1k", None, None, None).resize
    for crop in (CenterCrop(224, 0.875), own):
        with pytest.raises(ImageTooLargeError, match="shorter side"):
            crop(pixels, None)
        assert crop(pixels[:, :600], None).shape == (224, 224, 3)
    if resize == "short-edge":
        with pytest.raises(BadImageError, match="too long"):
            store_image(data, 64, resize, 95)
    else:
        store_image(data, 64, resize, 95)


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
        (with_preview(FILES["JPEG rotated 6"])[:-200] + bytes(10_000), "truncated"),
        (FILES["PNG"][:-200], "truncated or damaged"),
        (FILES["JPEG"][:200] + b"\xff\xd9", "truncated"),
    ],
)
def test_what_is_no_image_says_why(data, why):
    with pytest.raises(BadImageError, match=why):
        decode(data)


def test_of_a_cut_animation_no_part_ends_a_run():
    frames = [Image.fromarray(NOISE[..., number]) for number in range(4)]
    whole = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    for length in range(0, len(whole), 7):
        with contextlib.suppress(BadImageError):
            decode(whole[:length])


def test_no_room_is_made_for_an_enormous_jpeg(monkeypatch):
    decode(FILES["JPEG"])
    monkeypatch.setattr("wn21k_zoo.training.decode.BOMB_PIXELS", 20 * 30 - 1)
    with pytest.raises(BadImageError, match="megapixels"):
        decode(FILES["JPEG"])


@pytest.mark.parametrize("read", [decode, lambda data: store_image(data, 64, "squash", 90)], ids=["train", "prepare"])
def test_no_image_is_run_as_a_program(monkeypatch, read):
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("run"))
    with pytest.raises(BadImageError, match="not an image"):
        read(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n")


def test_a_photograph_that_needs_an_extra_is_one_bad_sample(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BadImageError, match=r"wn21k-zoo\[heif\]"):
        decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))


def test_a_photograph_whose_colour_profile_is_damaged_counts():
    whole = encoded(Image.fromarray(NOISE[..., :3]), "JPEG")
    data = whole[:2] + b"\xff\xe2\0\x0eICC_PROFILE\0" + whole[2:]
    one, other = (store_image(each, 32, "squash", 95) for each in (data, whole))
    assert np.array_equal(decode(one.data), decode(other.data))


def test_a_whole_jpeg_with_a_flaw_counts():
    flawed = bytearray(FILES["JPEG"])
    flawed[-12:-8] = b"\xff\xd4\x00\x00"  # a restart marker where none belongs
    assert decode(bytes(flawed)).shape == (20, 30, 3)


@pytest.mark.parametrize("before", [0, 70_000, 200_000])
def test_photographs_are_upright_however_much_stands_before_their_metadata(before):
    def segment(marker, content):
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(content) + 2) + content

    exif = Image.Exif()
    exif[274] = 6
    text = exif.tobytes()
    comments = [segment(0xFE, b"c" * min(60_000, before - done)) for done in range(0, before, 60_000)]
    plain = io.BytesIO()
    Image.new("RGB", (60, 40)).save(plain, "JPEG")
    data = plain.getvalue()[:2] + b"".join(comments) + segment(0xE1, text) + plain.getvalue()[2:]
    assert np.asarray(load_image(data)).shape == decode(data).shape == (60, 40, 3)
    stored = store_image(data, 500, "squash", 95)
    assert (stored.action, stored.orientation, stored.stored_width, stored.stored_height) == ("re-encoded", 6, 40, 60)
