"""The Once-for-All network with 595 M multiply-adds (Cai et al. 2020, https://arxiv.org/abs/1908.09791).

A MobileNetV3 whose kernel sizes and expansions were found by search. The published checkpoint has swish and sigmoid
where MobileNetV3 has hard-swish and hard-sigmoid. timm's MobileNetV3 can express it, and provides feature extraction,
``reset_classifier``, ``forward_features`` and gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

__all__ = ["DEFAULT_CONFIG", "STAGE_DEPTHS", "ofa_flops_595m_s"]

# timm's block strings, a list per stage: kernel, stride, expansion, output channels, squeeze-excite, ReLU ("nre").
_STAGES = (
    ("ds_r1_k3_s1_e1_c24_nre",),
    ("ir_r1_k3_s2_e3_c32_nre", "ir_r1_k5_s1_e4_c32_nre", "ir_r1_k3_s1_e3_c32_nre"),
    (
        "ir_r1_k5_s2_e4_c48_se0.25_nre",
        "ir_r1_k5_s1_e4_c48_se0.25_nre",
        "ir_r1_k3_s1_e6_c48_se0.25_nre",
        "ir_r1_k5_s1_e3_c48_se0.25_nre",
    ),
    ("ir_r1_k7_s2_e6_c96", "ir_r1_k5_s1_e6_c96", "ir_r1_k3_s1_e3_c96", "ir_r1_k5_s1_e4_c96"),
    (
        "ir_r1_k3_s1_e6_c136_se0.25",
        "ir_r1_k5_s1_e6_c136_se0.25",
        "ir_r1_k7_s1_e6_c136_se0.25",
        "ir_r1_k3_s1_e4_c136_se0.25",
    ),
    (
        "ir_r1_k3_s2_e6_c192_se0.25",
        "ir_r1_k3_s1_e6_c192_se0.25",
        "ir_r1_k5_s1_e6_c192_se0.25",
        "ir_r1_k3_s1_e3_c192_se0.25",
    ),
    ("cn_r1_k1_s1_c1152",),
)
STAGE_DEPTHS = tuple(len(stage) for stage in _STAGES)

DEFAULT_CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "architecture": "ofa_flops_595m_s",
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "first_conv": "conv_stem",
        "classifier": "classifier",
    }
)


def ofa_flops_595m_s(pretrained: bool = False, **kwargs: Any) -> Any:
    """OFA-595M (s): [batch, 3, H, W] to logits [batch, num_classes]; features at strides 2, 4, 8, 16 and 32.

    Args:
        pretrained: Load the weights that ``pretrained_cfg`` names.
        **kwargs: As for timm's entry points: ``num_classes``, ``in_chans``, ``features_only``, ``out_indices``,
            ``drop_rate``, ``pretrained_cfg``, ...
    """
    from timm.models import build_model_with_cfg
    from timm.models._efficientnet_blocks import SqueezeExcite
    from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, resolve_bn_args, round_channels
    from timm.models.mobilenetv3 import MobileNetV3, MobileNetV3Features
    from torch import nn

    arguments: dict[str, Any] = {
        "block_args": decode_arch_def([list(stage) for stage in _STAGES]),
        "stem_size": 24,
        "fix_stem": True,
        "num_features": 1536,
        "head_bias": False,
        "act_layer": resolve_act_layer(kwargs, "silu"),
        "norm_layer": partial(nn.BatchNorm2d, **resolve_bn_args(kwargs)),
        "se_layer": partial(SqueezeExcite, force_act_layer=nn.ReLU, rd_round_fn=round_channels),
    }
    config = kwargs.pop("pretrained_cfg", None)
    if not isinstance(config, Mapping):
        config = {**DEFAULT_CONFIG, **({"tag": config} if config else {})}
    features_only = kwargs.pop("features_only", False)
    in_class = features_only and not {"feature_cfg", "feature_cls"} & set(kwargs)
    return build_model_with_cfg(
        MobileNetV3Features if in_class else MobileNetV3,
        "ofa_flops_595m_s",
        pretrained,
        pretrained_cfg=config,
        features_only=features_only and not in_class,
        pretrained_strict=not in_class,
        kwargs_filter=("num_classes", "num_features", "head_bias", "global_pool") if in_class else None,
        **arguments,
        **kwargs,
    )
