"""OCP microscaling formats: a power of two (E8M0) per 32 of a row; nothing is calibrated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from post_training.quantization.formats.base import (
    FormatFamily,
    NumberFormat,
    block_sizes,
    linear_format,
)

_E8M0 = (8, 0)
_BLOCK = 32


def _has_elements(num_bits: int | tuple[int, int]) -> Callable[[Any], bool]:
    def is_used_by(quantizer: Any) -> bool:
        blocks = block_sizes(quantizer)
        is_mx = blocks.get("scale_bits") == _E8M0 and blocks.get(-1) == _BLOCK
        return is_mx and quantizer.num_bits == num_bits

    return is_used_by


MX = FormatFamily(
    weights=(
        NumberFormat(
            "mxfp8",
            _has_elements((4, 3)),
            bits=8.25,  # an E8M0 scale per 32
            block_size=_BLOCK,
            exported_as={"mxfp8": "MXFP8"},
        ),
        NumberFormat(
            "mxfp6",
            _has_elements((3, 2)),
            bits=6.25,
            block_size=_BLOCK,
            refused="no engine reads MXFP6",
        ),
        NumberFormat(
            "mxfp4",
            _has_elements((2, 1)),
            bits=4.25,
            block_size=_BLOCK,
            refused="vLLM reads no MXFP4 that ModelOpt writes",
        ),
        NumberFormat(
            "mxint8",
            _has_elements(8),
            bits=8.25,
            block_size=_BLOCK,
            refused="no engine reads MXINT8",
        ),
    ),
    formats=(
        linear_format("MXFP8_DEFAULT_CFG", "mxfp8", "mxfp8", "mxfp8", ""),
        linear_format("MXFP6_DEFAULT_CFG", "mxfp6", "mxfp6", "mxfp6", ""),
        linear_format("MXFP4_DEFAULT_CFG", "mxfp4", "mxfp4", "mxfp4", ""),
        linear_format(
            "MXFP4_MLP_WEIGHT_ONLY_CFG", "mxfp4_mlp_weight_only", "mxfp4", "", "", layers="MLP"
        ),
        linear_format("W4A8_MXFP4_FP8_CFG", "w4a8_mxfp4_fp8", "mxfp4", "fp8", ""),
        linear_format("MXINT8_DEFAULT_CFG", "mxint8", "mxint8", "mxint8", ""),
    ),
)
