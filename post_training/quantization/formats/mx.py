"""OCP microscaling formats: a power of two (E8M0) per 32 of a row; nothing is calibrated."""

from __future__ import annotations

from typing import Any

from post_training.quantization.formats.base import Format, FormatFamily, NumberFormat


def _microscaling(
    name: str, num_bits: int | tuple[int, int], bits: int, **more: Any
) -> NumberFormat:
    blocks = {-1: 32, "scale_bits": (8, 0)}
    return NumberFormat(name, num_bits, "block", blocks, bits=bits + 8 / 32, block_size=32, **more)


MX = FormatFamily(
    weights=(
        _microscaling("mxfp8", (4, 3), 8, exported_as={"mxfp8": "MXFP8"}),
        _microscaling("mxfp6", (3, 2), 6, refused="no engine reads MXFP6"),
        _microscaling(
            "mxfp4",
            (2, 1),
            4,
            exported_as={"mxfp4": "MXFP4", "": "W4A16_MXFP4"},
            refused="vLLM reads MXFP4 with inputs in MXFP4 or 16 bits",
        ),
        _microscaling("mxint8", 8, 8, refused="no engine reads MXINT8"),
    ),
    formats=(
        Format("MXFP8_DEFAULT_CFG", "mxfp8", "mxfp8", ""),
        Format("MXFP6_DEFAULT_CFG", "mxfp6", "mxfp6", ""),
        Format("MXFP4_DEFAULT_CFG", "mxfp4", "mxfp4", ""),
        Format("MXFP4_MLP_WEIGHT_ONLY_CFG", "mxfp4", "", "", layers="MLP"),
        Format("W4A8_MXFP4_FP8_CFG", "mxfp4", "fp8", ""),
        Format("MXINT8_DEFAULT_CFG", "mxint8", "mxint8", ""),
    ),
)
