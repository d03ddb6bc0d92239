"""Load anything that can pass for an image as upright RGB on white; or raise a typed error before memory is spent.

A URL is fetched only when the caller allows it (:mod:`wn21k_zoo.urls`).
"""

from __future__ import annotations

import inspect
import io
import math
import os
import warnings
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from wn21k_zoo.errors import (
    ImageDecodeError,
    ImageError,
    ImageNotFoundError,
    ImageTooLargeError,
    ImageURLError,
    MissingExtraError,
    UnsupportedImageError,
    first_line,
)
from wn21k_zoo.files import in_package

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMATS",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "SAMPLES",
    "AnimatedImageWarning",
    "ImageLike",
    "check_resized",
    "describe_source",
    "load_image",
    "orientation_of",
]

ImageLike = Union[
    str, os.PathLike[str], Image.Image, NDArray[Any], "torch.Tensor", bytes, bytearray, memoryview, BinaryIO
]
MAX_PIXELS = 89_478_485
"""Above this Pillow warns of a decompression bomb."""
# Which files of a folder count as images; a file that is named itself is tried whatever its suffix.
IMAGE_SUFFIXES = (
    ".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm",
    ".ppm", ".tga", ".tif", ".tiff", ".webp",
)  # fmt: skip
# Pillow's readers for these. It has dozens more, one of which (EPS) runs the file as a program in Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TGA", "TIFF")
SAMPLES = MappingProxyType({"cat": "chelsea.png", "coffee": "coffee.png", "rocket": "rocket.jpg"})

_SHOWN = 500  # characters; a longer name is cut in messages
_SIXTEEN_BIT_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I")
_TURNED = MappingProxyType(
    {  # by EXIF orientation; what makes the image upright
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
)
_WITH_ORIENTATION = ("exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp")  # where Image.getexif looks for it
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class AnimatedImageWarning(UserWarning):
    """An image has several frames; the first one is used."""


def load_image(image: ImageLike, *, allow_url: bool = False) -> Image.Image:
    """Decode and normalise one image.

    EXIF rotation is applied, transparency is composited onto white, grey and 16-bit grey become 8-bit RGB, CMYK becomes
    RGB, and the first frame of an animation is used.

    Args:
        image: A path, ``sample:cat|coffee|rocket`` (extra ``demo``), a PIL image, a NumPy array (uint8 or uint16;
            [H, W], [H, W, 1], [H, W, 2], [H, W, 3] or [H, W, 4]: grey, grey with alpha, RGB, RGBA), a torch tensor
            (uint8, or float in [0, 1]; [H, W] or [C, H, W]), bytes of an image file, or a binary file object. A URL
            only with ``allow_url``.
        allow_url: Whether to fetch ``http://`` and ``https://`` images from public addresses.

    Returns:
        An RGB image, without the metadata that say how to turn it.

    Raises:
        ImageNotFoundError: No such file.
        ImageDecodeError: Truncated, empty, a directory, or not an image.
        ImageTooLargeError: Over 89 megapixels.
        UnsupportedImageError: A type, shape, data type or value range with no single interpretation.
        ImageURLError: A URL that is not allowed or cannot be fetched.
        MissingExtraError: The image needs an optional dependency (HEIF photographs, samples).
    """
    name = describe_source(image)
    if isinstance(image, Image.Image):
        return _to_rgb(image, name)
    if isinstance(image, np.ndarray):
        opened: Image.Image = _from_array(image)
    elif isinstance(image, (bytes, bytearray, memoryview)):
        opened = _open(io.BytesIO(image), name)
    elif isinstance(image, (str, os.PathLike)):
        opened = _from_name(os.fspath(image), name, allow_url=allow_url)
    elif callable(getattr(image, "read", None)):
        opened = _open(_seekable(image, name), name)
    elif type(image).__module__.startswith("torch") and hasattr(image, "detach"):
        opened = _from_tensor(image)
    else:
        raise UnsupportedImageError(
            f"A {type(image).__name__} is not an image; give a path, PIL image, array, tensor, bytes or file object."
        )
    with opened:  # closes a file opened here, not one of the caller's
        return _to_rgb(opened, name)


def describe_source(image: object) -> str | None:
    """Name of an image in results and messages: path, URL or a file object's name; None for data in memory."""
    if isinstance(image, (str, os.PathLike)):
        return str(os.fspath(image))
    name = getattr(image, "filename", None) or getattr(image, "name", None)
    return name if isinstance(name, str) and name else None


def check_resized(size: tuple[int, int], short_side: float, name: str) -> None:
    """Refuse a very elongated image, which would become enormous when its shorter side is resized.

    Args:
        size: Width and height in pixels.
        short_side: The shorter side after the resize, in pixels.
        name: The image's name in messages.

    Raises:
        ImageTooLargeError: It would have over 89 megapixels.
    """
    pixels = short_side**2 * max(size) / min(size)
    if pixels > MAX_PIXELS:
        raise ImageTooLargeError(
            f"{name} is {size[0]} by {size[1]} pixels: with its shorter side resized to {short_side:.0f} it would have "
            f"{pixels / 1e6:.0f} megapixels; crop it first."
        )


def _from_name(name: str, shown: str | None, *, allow_url: bool) -> Image.Image:
    if name.startswith("sample:"):
        return _open(_sample(name.removeprefix("sample:")), shown)
    if name.lower().startswith(("http://", "https://")):
        if not allow_url:
            raise ImageURLError(f"{name} is a URL; allow it with --allow-url or allow_url=True, or download it first.")
        from wn21k_zoo import hub
        from wn21k_zoo.urls import fetch_url

        if hub.is_offline():
            raise ImageURLError(f"{name} is a URL, and the network is switched off (HF_HUB_OFFLINE or --offline).")

        return _open(io.BytesIO(fetch_url(name)), shown)
    path = Path(name)
    if os.path.isdir(name):  # noqa: PTH112 - these two accept any name, even an impossible one
        raise ImageDecodeError(f"{name} is a directory, not an image; name image files in it.")
    if "\0" in name or not os.path.exists(name):  # noqa: PTH110
        if len(name) > _SHOWN or name.startswith("data:"):  # base64, say
            raise ImageNotFoundError(
                f"There is no file {name[:20]!r} (and {max(0, len(name) - 20):,} more characters); if it is an encoded "
                "image, give its bytes."
            )
        raise ImageNotFoundError(
            f"There is no file {name!r}." if not name.isprintable() else f"There is no file {name}."
        )
    return _open(path, shown)


def _sample(name: str) -> Path:
    if name not in SAMPLES:
        raise ImageNotFoundError(f"No sample is called {name!r}; there are {', '.join(SAMPLES)}.")
    path = in_package("skimage", f"data/{SAMPLES[name]}")
    if path is None:
        raise MissingExtraError("The sample photographs of scikit-image", "demo")
    return path


def _seekable(file: Any, name: str | None) -> BinaryIO:
    try:
        content = getattr(file, "seekable", lambda: False)()
        if content and not inspect.isawaitable(content):
            content = file.read(0)
            if isinstance(content, bytes):
                return file  # type: ignore[no-any-return]
        if not inspect.isawaitable(content):
            content = file.read()
    except (OSError, ValueError) as error:
        raise ImageDecodeError(f"{name or 'The file object'} cannot be read ({first_line(error)}).") from error
    if inspect.isawaitable(content):
        if inspect.iscoroutine(content):
            content.close()
        raise UnsupportedImageError(
            f"{name or 'The file object'} is read asynchronously; give `await file.read()`, or the inner file (.file)."
        )
    if not isinstance(content, bytes):
        raise UnsupportedImageError(f"{name or 'The file object'} is open as text; open it with mode 'rb'.")
    return io.BytesIO(content)


def _open(file: Path | BinaryIO, name: str | None) -> Image.Image:
    shown = name or "The image"
    try:
        return Image.open(file, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # warnings can be errors
        raise ImageTooLargeError(
            f"{shown} has over {MAX_PIXELS // 10**6} megapixels; make it smaller first."
        ) from error
    except UnidentifiedImageError as error:
        head = _first_bytes(file)
        if head[4:8] == b"ftyp" and head[8:12] in _HEIF_BRANDS:
            return _open_heif(file, shown)
        what = (
            "is empty (0 bytes)"
            if not head
            else "is not an image of a known format; convert it to PNG, or give it as a PIL image"
        )
        raise ImageDecodeError(f"{shown} {what}.") from error
    except PermissionError as error:
        raise ImageDecodeError(f"{shown} may not be read; check its permissions.") from error
    except Exception as error:  # Pillow's format plugins raise all kinds of errors for a damaged header
        raise ImageDecodeError(f"{shown} cannot be decoded ({first_line(error)}).") from error


def _first_bytes(file: Path | BinaryIO) -> bytes:
    if isinstance(file, Path):
        with file.open("rb") as opened:
            return opened.read(12)
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    return head


def _open_heif(file: Path | BinaryIO, shown: str) -> Image.Image:
    try:
        import pillow_heif
    except ImportError as error:
        raise MissingExtraError(f"The HEIF photograph {shown}", "heif") from error
    pillow_heif.register_heif_opener()
    try:
        return Image.open(file, formats=("HEIF",))
    except Exception as error:  # as in _open
        raise ImageDecodeError(f"{shown} is a HEIF photograph that cannot be decoded.") from error


def _to_rgb(image: Image.Image, name: str | None) -> Image.Image:
    shown = name or "The image"
    width, height = image.size
    if not width or not height:
        raise ImageDecodeError(f"{shown} has no pixels.")
    try:
        pixels = max(width * height, _pixels_of_tile(image))
        animated = pixels <= MAX_PIXELS and getattr(image, "is_animated", False)  # looks for a second frame
    except Exception as error:  # as below
        raise ImageDecodeError(f"{shown} is truncated or damaged ({first_line(error)}).") from error
    if pixels > MAX_PIXELS:
        raise ImageTooLargeError(
            f"{shown} has {math.ceil(pixels / 1e6)} megapixels; at most {MAX_PIXELS // 10**6} are decoded, make it "
            "smaller first."
        )
    if animated and image.format != "MPO":  # MPO: a camera's JPEG with previews
        warnings.warn(f"{shown} is animated; its first frame is used.", AnimatedImageWarning, stacklevel=3)
    try:
        image.load()
        rgb = _opaque_rgb(image, shown)
        turned = _TURNED.get(orientation_of(image))
        upright = rgb.transpose(turned) if turned is not None else rgb.copy() if rgb is image else rgb
        for key in _WITH_ORIENTATION:  # or whoever reads it would turn the image once more
            upright.info.pop(key, None)
        return upright
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of errors for damaged data
        raise ImageDecodeError(f"{shown} is truncated or damaged ({first_line(error)}).") from error


def orientation_of(image: Image.Image) -> int:
    """EXIF orientation of an image, 1 (upright) to 8; 1 if it has none, or metadata that cannot be read.

    ``ImageOps.exif_transpose`` also writes the other metadata anew, and fails if they are out of range.
    """
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return int(orientation) if orientation in _TURNED else 1
    except Exception:  # damaged metadata make Pillow raise all sorts of exceptions
        return 1


def _pixels_of_tile(image: Image.Image) -> int:
    """Pixels of a tile in a tiled TIFF, whose decoder allocates a whole one however small the image is; else 0."""
    tags = getattr(image, "tag_v2", {})
    return int(tags.get(ExifTags.Base.TileWidth, 0)) * int(tags.get(ExifTags.Base.TileLength, 0))


def _opaque_rgb(image: Image.Image, shown: str) -> Image.Image:
    if image.mode == "I" and image.format != "PNG":  # in a PNG it is known to mean 16 bits
        raise UnsupportedImageError(f"{shown} has 32-bit integers of unknown range; convert it to 8 bits first.")
    if image.mode in _SIXTEEN_BIT_MODES:
        return Image.fromarray(_eight_bit_grey(image)).convert("RGB")
    if image.mode == "F":
        raise UnsupportedImageError(f"{shown} has floating-point pixels of unknown range; convert it to 8 bits first.")
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        if image.format == "TGA" and with_alpha.getchannel("A").getextrema() == (0, 0):  # the byte means nothing there
            return with_alpha.convert("RGB")
        white = Image.new("RGBA", with_alpha.size, "white")
        return Image.alpha_composite(white, with_alpha).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bit_grey(image: Image.Image) -> NDArray[np.uint8]:
    """Grey of 16 bits or, in a TIFF, 12; there 0 may be white, and in a PNG one value may be transparent."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, 16)
    grey = _eight_bit(np.asarray(image), 2 ** int(bits[0] if isinstance(bits, tuple) else bits) - 1)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0:
        grey = np.subtract(255, grey, dtype=np.uint8)
    if isinstance(transparent := image.info.get("transparency"), int):
        grey[np.asarray(image) == transparent] = 255
    return grey


def _eight_bit(pixels: NDArray[Any], largest: int = 65_535) -> NDArray[np.uint8]:
    return np.round(pixels * (255 / largest)).astype(np.uint8)


def _from_array(array: NDArray[Any]) -> Image.Image:
    shape = tuple(array.shape)
    if array.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (1, 2, 3, 4):
        raise UnsupportedImageError(f"An array of shape {shape} looks like [C, H, W]; give [H, W, C].")
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 2, 3, 4)) or 0 in shape:
        raise UnsupportedImageError(
            f"An array of shape {shape} is not an image; give [H, W] or [H, W, C] with 1 to 4 channels."
        )
    if shape[0] * shape[1] > MAX_PIXELS:
        raise ImageTooLargeError(f"An array of shape {shape} has over {MAX_PIXELS // 10**6} megapixels.")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:  # in either byte order
        array = _eight_bit(array)
    elif array.dtype != np.uint8:
        raise UnsupportedImageError(
            f"An array of {array.dtype} has no fixed range; give uint8, such as (image * 255).round().astype('uint8')."
        )
    if array.ndim == 3 and shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _from_tensor(tensor: Any) -> Image.Image:
    import torch

    shape = tuple(tensor.shape)
    if tensor.ndim == 3 and shape[0] not in (1, 3, 4):
        raise UnsupportedImageError(
            f"A tensor of shape {shape} is not an image; give [C, H, W] with 1, 3 or 4 channels."
        )
    if tensor.ndim not in (2, 3):
        raise UnsupportedImageError(f"A tensor of shape {shape} is not an image; give [H, W] or [C, H, W].")
    if shape[-1] * shape[-2] > MAX_PIXELS:
        raise ImageTooLargeError(f"A tensor of shape {shape} has over {MAX_PIXELS // 10**6} megapixels.")
    pixels = tensor.detach().cpu()
    if pixels.is_floating_point():
        if not bool(((pixels >= 0) & (pixels <= 1)).all()):
            raise UnsupportedImageError(
                "A float tensor has values outside [0, 1]; give an image that is not normalised."
            )
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    elif pixels.dtype not in (torch.uint8, torch.uint16, torch.bool):
        raise UnsupportedImageError(f"A tensor of {pixels.dtype} has no fixed range; give uint8, or float in [0, 1].")
    return _from_array((pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels).numpy())
