"""Decode an image file to the pixels that :func:`wn21k_zoo.predict` sees, by the fastest decoder for it."""

from __future__ import annotations

import contextlib
import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wn21k_zoo.errors import ImageDecodeError, ImageError, MissingExtraError
from wn21k_zoo.images import FORMATS, load_image, orientation_of
from wn21k_zoo.training.encode import BEGIN_OF_JPEG, BOMB_PIXELS, BadImageError, is_cut_off, metadata_of
from wn21k_zoo.training.extra import cv2, simplejpeg

__all__ = ["decode"]

_APP1 = b"\xff\xe1"  # EXIF or XMP


def decode(data: bytes) -> NDArray[np.uint8]:
    """Decode an image file to RGB pixels, upright and on white, shape [height, width, 3].

    A JPEG that its decoder complains about is accepted if it is complete. One without metadata may have as many pixels
    as data preparation accepts, other files as many as :func:`wn21k_zoo.images.load_image` accepts, or more.

    Raises:
        BadImageError: Truncated, damaged, too large or not an image.
    """
    is_jpeg = data.startswith(BEGIN_OF_JPEG)
    if is_jpeg and _is_upright(data):
        with contextlib.suppress(ValueError):  # another decoder may read it
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            if height * width > BOMB_PIXELS:
                raise BadImageError(f"has {height * width / 1e6:.0f} megapixels")
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
            return pixels
    if is_jpeg and is_cut_off(data):
        raise BadImageError("truncated")
    try:
        with warnings.catch_warnings(action="ignore"):  # e.g. about frames that are left out
            return np.array(load_image(data))
    except (ImageError, MissingExtraError) as error:
        if is_jpeg and isinstance(error, ImageDecodeError):
            found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
            if found is not None:
                return np.asarray(cv2.cvtColor(found, cv2.COLOR_BGR2RGB), np.uint8)
        raise BadImageError(str(error).removeprefix("The image ").rstrip(".")) from None


def _is_upright(data: bytes) -> bool:
    """Whether a JPEG is stored upright; also False if it cannot be opened."""
    if _APP1 not in metadata_of(data):
        return True
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return orientation_of(image) == 1
    except Exception:  # Pillow's readers raise all sorts of exceptions for a damaged header
        return False
