"""Architectures that timm lacks: names to functions with the interface of timm's own entry points."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from wn21k_zoo.architectures.ofa import ofa_flops_595m_s

__all__ = ["ARCHITECTURES"]

ARCHITECTURES: Mapping[str, Callable[..., Any]] = MappingProxyType({"ofa_flops_595m_s": ofa_flops_595m_s})
