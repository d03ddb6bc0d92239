"""Stored bytes to pixels, with the fastest decoder that is at hand for them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from wn21k_zoo.training.extra import cv2, simplejpeg

__all__ = ["UndecodableError", "decode"]

_JPEG = b"\xff\xd8\xff"
_END_OF_IMAGE = b"\xff\xd9"


class UndecodableError(Exception):
    """Why a stored image cannot be decoded."""


def decode(data: bytes | memoryview) -> NDArray[np.uint8]:
    """An image file as RGB pixels, shape [height, width, 3].

    What :mod:`wn21k_zoo.training.images` would have taken is taken here: a JPEG that its decoder grumbles about counts
    if it is complete.

    Raises:
        UndecodableError: Truncated, damaged or no image.
    """
    if bytes(data[:3]) == _JPEG:
        try:
            pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
            return pixels
        except ValueError:
            if _END_OF_IMAGE not in bytes(data[-4096:]):
                raise UndecodableError("truncated") from None
    found = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if len(data) else None
    if found is None:
        raise UndecodableError("cannot be decoded" if len(data) else "empty")
    return np.asarray(cv2.cvtColor(found, cv2.COLOR_BGR2RGB), np.uint8)
