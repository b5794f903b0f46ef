"""FP8 (E4M3): one scale a tensor, a row and token, or a block of 128 x 128."""

from __future__ import annotations

from post_training.quantization.formats.base import Format, FormatFamily, NumberFormat

FP8 = FormatFamily(
    inputs=(NumberFormat("fp8_token", (4, 3), "token"),),
    weights=(
        NumberFormat(
            "fp8",
            (4, 3),
            bits=8.0,
            largest=448.0,
            exported_as={"fp8": "FP8"},
            refused="weights alone are FP8, and the engines' FP8 layers need a static input scale",
        ),
        NumberFormat(
            "fp8_channel",
            (4, 3),
            "channel",
            bits=8.0,
            exported_as={"fp8_token": "FP8_PER_CHANNEL_PER_TOKEN"},
            refused="engines read one scale a row with inputs in FP8, a scale for each token",
        ),
        NumberFormat(
            "fp8_block",
            (4, 3),
            "block",
            {-1: 128, -2: None},
            bits=8.0,  # a float32 scale per 128 x 128
            block_size=128,
            block_rows=128,
            exported_as={"": "FP8_PB_WO"},
        ),
        NumberFormat(
            "fp8_square",
            (4, 3),
            "block",
            {-1: 128, -2: 128},
            bits=8.0,
            block_size=128,
            refused="its blocks cross the borders of q, k, v in Megatron's matrix; quantize the "
            "model again",
        ),
    ),
    formats=(
        Format("FP8_DEFAULT_CFG", "fp8", "fp8"),
        Format("FP8_PER_CHANNEL_PER_TOKEN_CFG", "fp8_channel", "fp8_token", alias="fp8_pc_pt"),
        Format("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG", "fp8_block", alias="fp8_pb_wo"),
        Format("MAMBA_MOE_FP8_AGGRESSIVE_CFG", "fp8", "fp8", layers="all but attention"),
        Format(
            "MAMBA_MOE_FP8_CONSERVATIVE_CFG", "fp8", "fp8", layers="all but attention and Mamba"
        ),
    ),
)
