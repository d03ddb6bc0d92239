"""Access to a data set one image at a time: its open shards, and a dataset for torch's own loaders."""

from __future__ import annotations

import operator
import os
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from wn21k_zoo.errors import BadImagesError, DataError, InvalidArgumentError, first_line
from wn21k_zoo.training.dataset import ImageDataset, Images, ShardedDataset
from wn21k_zoo.training.decode import decode
from wn21k_zoo.training.encode import BadImageError
from wn21k_zoo.training.folder import FolderDataset

__all__ = ["AnyDataset", "OpenShards", "TorchDataset", "check_dataset"]

AnyDataset: TypeAlias = ImageDataset | ShardedDataset | FolderDataset
"""Names our classes instead of a protocol, since pyright does not take a cached property for a protocol's property."""


def check_dataset(dataset: object, taker: str) -> None:
    """Check that images can be read from an argument.

    Raises:
        InvalidArgumentError: It is something else, such as the name of a folder.
    """
    if not hasattr(dataset, "lengths"):
        named = isinstance(dataset, (str, os.PathLike))
        what = f"such as open_dataset({str(dataset)!r})" if named else f"not {type(dataset).__name__}"
        raise InvalidArgumentError(f"{taker} takes what open_dataset or open_folder returns, {what}.")


class OpenShards:
    """The shards of a data set that were read last, kept open; another process, forked or not, opens its own.

    Args:
        dataset: The data set.
        limit: Number of shards to keep open.
    """

    def __init__(self, dataset: ImageDataset, limit: int) -> None:
        self._dataset, self._limit = dataset, limit
        self._open: OrderedDict[int, tuple[Images, NDArray[np.void]]] = OrderedDict()
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        for file, _ in self._open.values():
            file.close()

    def __getitem__(self, number: int) -> tuple[Images, NDArray[np.void]]:
        """Return the reader of a shard's images, and its index.

        Raises:
            DataError: The shard is missing or damaged, or cannot be opened.
        """
        if self._process != os.getpid():  # a fork, whose reads would move the others' file position
            self._open, self._process = OrderedDict(), os.getpid()
        found = self._open.get(number)
        for _ in range(5):
            if found is not None:
                break
            try:
                found = self._dataset.open(number)
            except FileNotFoundError:  # another process needed its space on the stage
                continue
            except OSError as error:
                name = self._dataset.shard_name(number)
                raise DataError(f"The shard {name} cannot be opened: {first_line(error)}.") from error
        if found is None:
            raise DataError(
                f"The shard {self._dataset.shard_name(number)} is missing, or the stage is too small for one window."
            )
        self._open[number] = found
        self._open.move_to_end(number)
        while len(self._open) > self._limit:
            self._open.popitem(last=False)[1][0].close()
        return found

    def read(self, number: int, entry: np.void) -> bytes:
        """Return the file of an image by its entry in a shard's index.

        A read that fails is tried once more on the shard opened anew, which a network file system may need.

        Raises:
            OSError: It failed again.
            DataError: As :meth:`__getitem__`.
        """
        place = int(entry["offset"]), int(entry["size"])
        try:
            return self[number][0].read(*place)
        except OSError:
            self._open.pop(number)[0].close()
            return self[number][0].read(*place)

    def key(self, number: int, entry: np.void) -> str:
        """Return the name of an image's file, for messages."""
        return self[number][0].key(int(entry["offset"]))


class TorchDataset(Dataset[tuple[Any, int]]):
    """The images of a data set one by one, for torch's DataLoader, timm's ``create_loader`` and the like.

    :class:`wn21k_zoo.training.data.Loader` is faster on shards, which it reads one after another, and can resume within
    an epoch.

    Args:
        dataset: From :func:`wn21k_zoo.training.data.open_dataset` or ``open_folder``.
        transform: Called with a PIL image that is RGB, upright and on white; such as a transform of torchvision, timm
            or :func:`wn21k_zoo.create_transform`; may be set later. Default: none.

    Raises:
        InvalidArgumentError: ``dataset`` is not one of these.

    Example:
        >>> dataset = TorchDataset(open_folder("photos"), wn21k_zoo.create_transform("resnet50.miil_in21k", True))
        >>> loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)
    """

    def __init__(self, dataset: AnyDataset, transform: Callable[[Image.Image], Any] | None = None) -> None:
        check_dataset(dataset, "TorchDataset")
        self.dataset, self.transform = dataset, transform
        self._starts = np.cumsum([0, *dataset.lengths], dtype=np.int64)
        self._shards = OpenShards(dataset, 4)

    @property
    def classes(self) -> tuple[str, ...]:
        """The name of each class; torchvision calls the attribute this, too."""
        return self.dataset.class_names

    @cached_property
    def targets(self) -> NDArray[np.int64]:
        """The class of each image, [len(self)], say for torch's WeightedRandomSampler; read without the images."""
        indexes = [self.dataset.index(shard)["target"] for shard in range(len(self.dataset.lengths))]
        return np.concatenate(indexes).astype(np.int64)

    def __len__(self) -> int:
        return len(self.dataset)

    def __repr__(self) -> str:
        return f"TorchDataset({self.dataset!r}, {self.transform!r})"

    def __getitem__(self, index: int) -> tuple[Any, int]:
        """Return an image, transformed, and the index of its class.

        Raises:
            IndexError: There are fewer images.
            BadImagesError: The image is damaged.
            DataError: Its shard is missing.
        """
        sample = operator.index(index)
        if sample < 0:
            sample += len(self)
        if not 0 <= sample < len(self):
            raise IndexError(f"There are {len(self):,} images, but none has the index {index}.")
        shard = int(np.searchsorted(self._starts, sample, side="right")) - 1
        entry = self._shards[shard][1][sample - int(self._starts[shard])]
        try:
            pixels = decode(self._shards.read(shard, entry))
        except (BadImageError, OSError) as error:
            name = self.dataset.place(shard, self._shards.key(shard, entry))
            raise BadImagesError(f"{name} is damaged ({error}); remove it or replace it.") from None
        image = Image.fromarray(pixels)
        return self.transform(image) if self.transform is not None else image, int(entry["target"])
