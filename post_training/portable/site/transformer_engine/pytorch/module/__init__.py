"""Layers."""

from transformer_engine.pytorch.module import (
    base,
    grouped_linear,
    layernorm,
    layernorm_linear,
    linear,
    rmsnorm,
)
from transformer_engine.pytorch.module.fp8_padding import Fp8Padding, Fp8Unpadding
from transformer_engine.pytorch.module.grouped_linear import GroupedLinear
from transformer_engine.pytorch.module.layernorm import LayerNorm
from transformer_engine.pytorch.module.layernorm_linear import LayerNormLinear
from transformer_engine.pytorch.module.linear import Linear
from transformer_engine.pytorch.module.rmsnorm import RMSNorm

__all__ = [
    "Fp8Padding",
    "Fp8Unpadding",
    "GroupedLinear",
    "LayerNorm",
    "LayerNormLinear",
    "Linear",
    "RMSNorm",
    "base",
    "grouped_linear",
    "layernorm",
    "layernorm_linear",
    "linear",
    "rmsnorm",
]
