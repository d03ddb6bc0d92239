"""The libraries of the ``data`` extra in one place, so that a missing one says which extra to install."""

from __future__ import annotations

from wn21k_zoo.errors import MissingExtraError

try:
    import cv2
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
    import simplejpeg
except ImportError as error:
    raise MissingExtraError(f"Training data ({error.name} is missing)", "data") from error

__all__ = ["cv2", "pa", "pc", "pq", "simplejpeg"]
