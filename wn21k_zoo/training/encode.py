"""Convert one source image to the bytes that are stored.

Published (Ridnik et al. 2021, dataset_preprocessing/resize.py and resize_short_edge.py of the authors' repository):
OpenCV decodes (here only JPEG; other formats are decoded as for a prediction); if the longer side is at least the size,
bilinear resize to a square ("squash") or by the shorter side, and JPEG of quality 95; otherwise the file is copied.
Left open there and decided here:

- an image without the end-of-image marker is truncated, and counts as bad (OpenCV would paint the rest grey);
- a small file that is not a plain JPEG (PNG or CMYK under a JPEG name, rotated by EXIF) is re-encoded at its own size,
  upright, so that every decoder sees the same; plain ones are copied bit by bit, except for videos after their end;
- more than 179 million pixels (Pillow's limit against decompression bombs; half of it if not a JPEG) count as bad, and
  so do images that would be longer than a JPEG can be.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wn21k_zoo.errors import ImageError, ImageTooLargeError, MissingExtraError
from wn21k_zoo.images import FORMATS, MAX_PIXELS, load_image, orientation_of
from wn21k_zoo.training.extra import cv2, simplejpeg
from wn21k_zoo.training.options import Resize

__all__ = [
    "BEGIN_OF_JPEG",
    "BOMB_PIXELS",
    "BadImageError",
    "StoredImage",
    "is_cut_off",
    "metadata_of",
    "store_image",
]

BEGIN_OF_JPEG = b"\xff\xd8\xff"
_METADATA_WITHIN = 65536  # bytes, where the segments of a JPEG cannot be followed
BOMB_PIXELS = 2 * MAX_PIXELS  # above this Pillow refuses an image
_BEGIN_OF_SCAN = b"\xda"
_END_OF_IMAGE = b"\xff\xd9"
_MAX_SIDE = 65_500  # libjpeg's limit
_EXIF = b"Exif\x00\x00"


class BadImageError(Exception):
    """Why an image cannot be used, without its name: for the manifest, or for a message that adds the name."""


@dataclass(frozen=True, slots=True)
class StoredImage:
    """The result for one image: ``data`` is a JPEG file; widths and heights are in pixels, upright."""

    data: bytes
    action: Literal["resized", "copied", "re-encoded"]
    format: str
    mode: str
    orientation: int
    width: int
    height: int
    stored_width: int
    stored_height: int


def store_image(data: bytes, size: int, resize: Resize, quality: int) -> StoredImage:
    """Decode, check, and resize or copy one image file.

    Raises:
        BadImageError: Empty, truncated, not an image, or too large.
    """
    if not data:
        raise BadImageError("empty file")
    format_, mode, orientation = _inspect(data)
    pixels = _decode(data) if format_ == "JPEG" else _decode_other(data)
    height, width = pixels.shape[:2]
    if resize == "none" or max(height, width) < size:
        if format_ == "JPEG" and mode in ("RGB", "L") and orientation == 1:
            return StoredImage(_until_its_end(data), "copied", format_, mode, orientation, width, height, width, height)
        stored = _encode(pixels, quality)
        return StoredImage(stored, "re-encoded", format_, mode, orientation, width, height, width, height)
    if resize == "squash":
        resized = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_LINEAR)
    else:
        scale = size / min(height, width)
        if scale * max(height, width) > _MAX_SIDE:
            raise BadImageError("too long")
        resized = cv2.resize(pixels, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    stored = _encode(resized, quality)
    new_height, new_width = resized.shape[:2]
    return StoredImage(stored, "resized", format_, mode, orientation, width, height, new_width, new_height)


def is_cut_off(data: bytes) -> bool:
    """Whether a JPEG lacks its end marker; cameras and servers may append anything after it, such as a video."""
    return data.rfind(_END_OF_IMAGE, _begin_of_scan(data)) < 0


def _until_its_end(data: bytes) -> bytes:
    if _END_OF_IMAGE in data[-4096:]:
        return data
    return data[: data.index(_END_OF_IMAGE, _begin_of_scan(data)) + len(_END_OF_IMAGE)]


def metadata_of(data: bytes) -> bytes:
    """The part of a JPEG that holds its metadata."""
    return data[: max(_METADATA_WITHIN, _begin_of_scan(data))]


def _begin_of_scan(data: bytes) -> int:
    """Offset at which a JPEG's pixels begin: after its metadata, whose preview has its own end marker."""
    at = 2
    while data[at : at + 1] == b"\xff" and (marker := data[at + 1 : at + 2]) != _BEGIN_OF_SCAN:
        at += 1 if marker == b"\xff" else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return at


def _inspect(data: bytes) -> tuple[str, str, int]:
    """Format, mode and EXIF orientation, from the header alone."""
    format_, mode, orientation, width, height = _inspect_jpeg(data) or _inspect_any(data)
    if width * height > BOMB_PIXELS:
        raise BadImageError("too many pixels")
    if format_ == "JPEG" and is_cut_off(data):
        raise BadImageError("truncated")
    return format_, mode, orientation


def _inspect_jpeg(data: bytes) -> tuple[str, str, int, int, int] | None:
    """Inspect a JPEG without EXIF, also one whose other metadata are damaged, which Pillow refuses."""
    if not data.startswith(BEGIN_OF_JPEG) or _EXIF in metadata_of(data):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    mode = {"Gray": "L", "CMYK": "CMYK", "YCCK": "CMYK"}.get(colours, "RGB")
    return "JPEG", mode, 1, width, height


def _inspect_any(data: bytes) -> tuple[str, str, int, int, int]:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            format_, mode, (width, height) = image.format or "unknown", image.mode, image.size
            orientation = orientation_of(image) if "exif" in image.info else 1
    except Image.DecompressionBombError:
        raise BadImageError("too many pixels") from None
    except Exception:  # Pillow's readers raise all sorts of exceptions for a damaged header
        raise BadImageError("not an image") from None
    is_jpeg = format_ in ("JPEG", "MPO")  # MPO: a JPEG with more pictures after the first
    return "JPEG" if is_jpeg else format_, mode, orientation, width, height


def _decode(data: bytes) -> NDArray[np.uint8]:
    try:
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise BadImageError("cannot be decoded")
    return np.asarray(pixels, np.uint8)


def _decode_other(data: bytes) -> NDArray[np.uint8]:
    """Decode as a prediction does: how much OpenCV reads of other formats depends on its version."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about frames that are left out
            return np.ascontiguousarray(np.asarray(load_image(data))[:, :, ::-1])
    except ImageTooLargeError:
        raise BadImageError("too many pixels") from None
    except (ImageError, MissingExtraError):
        raise BadImageError("cannot be decoded") from None


def _encode(pixels: NDArray[Any], quality: int) -> bytes:
    done, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not done:
        raise BadImageError("cannot be encoded")
    return encoded.tobytes()
