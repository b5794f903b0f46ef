"""INT8 (one scale a tensor or output channel) and INT4 (a scale per 128 of a row)."""

from __future__ import annotations

from typing import Any

from post_training.quantization.formats.base import (
    FormatFamily,
    NumberFormat,
    block_sizes,
    linear_format,
)

_NO_INT8 = "vLLM reads no INT8 that ModelOpt writes"


def _is_int8(quantizer: Any) -> bool:
    return quantizer.num_bits == 8 and not block_sizes(quantizer) and quantizer.axis is None


def _is_int8_channel(quantizer: Any) -> bool:
    has_axis = quantizer.axis is not None
    return quantizer.num_bits == 8 and not block_sizes(quantizer) and has_axis


def _is_int8_token(quantizer: Any) -> bool:
    """One scale a token, found at run time."""
    is_dynamic = getattr(quantizer, "_dynamic", False)
    return quantizer.num_bits == 8 and is_dynamic and block_sizes(quantizer).get(-1) is None


def _is_int4_block(quantizer: Any) -> bool:
    return quantizer.num_bits == 4 and bool(block_sizes(quantizer))


INTEGER = FormatFamily(
    inputs=(NumberFormat("int8_token", _is_int8_token),),
    weights=(
        NumberFormat("int8", _is_int8, bits=8.0, refused=_NO_INT8),
        NumberFormat("int8_channel", _is_int8_channel, bits=8.0, refused=_NO_INT8),
        NumberFormat(
            "int4_block",
            _is_int4_block,
            bits=4.125,  # a bf16 scale per 128
            block_size=128,
            refused="ModelOpt's exporter writes INT4 without a configuration, as if it were plain",
        ),
        NumberFormat(
            "int4_block_fp8",
            parts=("int4_block", "fp8"),
            bits=4.125,
            block_size=128,
            refused="vLLM reads no INT4 with FP8 inputs that ModelOpt writes",
        ),
    ),
    formats=(
        linear_format("INT8_DEFAULT_CFG", "int8", "int8_channel", "int8"),
        linear_format(
            "INT8_SMOOTHQUANT_CFG",
            "int8_smoothquant int8_sq",
            "int8_channel",
            "int8",
            "smoothquant",
        ),
        linear_format("INT8_WEIGHT_ONLY_CFG", "int8_weight_only int8_wo", "int8_channel"),
        linear_format("INT4_AWQ_CFG", "int4_awq", "int4_block", method="awq_lite"),
        linear_format("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4_blockwise_weight_only", "int4_block"),
        linear_format(
            "W4A8_AWQ_BETA_CFG", "w4a8_awq_beta w4a8_awq", "int4_block_fp8", "fp8", "awq_lite"
        ),
    ),
)
