"""FP8 (E4M3): one scale a tensor, a row and token, or a block of 128 x 128."""

from __future__ import annotations

from typing import Any

from post_training.quantization.formats.base import (
    FormatFamily,
    NumberFormat,
    block_sizes,
    linear_format,
)

_E4M3 = (4, 3)
_LARGEST = 448.0


def _is_fp8(quantizer: Any) -> bool:
    return quantizer.num_bits == _E4M3 and not block_sizes(quantizer) and quantizer.axis is None


def _is_fp8_channel(quantizer: Any) -> bool:
    has_axis = quantizer.axis is not None
    return quantizer.num_bits == _E4M3 and not block_sizes(quantizer) and has_axis


def _is_fp8_block(quantizer: Any) -> bool:
    blocks = block_sizes(quantizer)
    return quantizer.num_bits == _E4M3 and bool(blocks) and "scale_bits" not in blocks


def _is_fp8_token(quantizer: Any) -> bool:
    """One scale a token, found at run time."""
    is_dynamic = getattr(quantizer, "_dynamic", False)
    return quantizer.num_bits == _E4M3 and is_dynamic and block_sizes(quantizer).get(-1) is None


FP8 = FormatFamily(
    inputs=(NumberFormat("fp8_token", _is_fp8_token),),
    weights=(
        NumberFormat(
            "fp8",
            _is_fp8,
            bits=8.0,
            largest=_LARGEST,
            exported_as={"fp8": "FP8"},
            refused="weights alone are FP8, and the engines' FP8 layers need a static input scale",
        ),
        NumberFormat(
            "fp8_channel",
            _is_fp8_channel,
            bits=8.0,
            refused="ModelOpt's exporter cannot split one scale per row into q, k and v",
        ),
        NumberFormat(
            "fp8_block",
            _is_fp8_block,
            bits=8.0,  # a float32 scale per 128 x 128
            block_size=128,
            refused="ModelOpt's scales of 128 x 128 blocks do not follow the split into q, k, v "
            "and gate, up",
        ),
    ),
    formats=(
        linear_format("FP8_DEFAULT_CFG", "fp8", "fp8", "fp8"),
        linear_format(
            "FP8_PER_CHANNEL_PER_TOKEN_CFG",
            "fp8_per_channel_per_token fp8_pc_pt",
            "fp8_channel",
            "fp8_token",
        ),
        linear_format(
            "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG",
            "fp8_2d_blockwise_weight_only fp8_pb_wo",
            "fp8_block",
        ),
        linear_format(
            "MAMBA_MOE_FP8_AGGRESSIVE_CFG",
            "mamba_moe_fp8_aggressive",
            "fp8",
            "fp8",
            layers="all but attention",
        ),
        linear_format(
            "MAMBA_MOE_FP8_CONSERVATIVE_CFG",
            "mamba_moe_fp8_conservative",
            "fp8",
            "fp8",
            layers="all but attention and Mamba",
        ),
    ),
)
