"""INT8 (one scale a tensor or output channel) and INT4 (a scale per 128 of a row)."""

from __future__ import annotations

from post_training.quantization.formats.base import GPTQ, Format, FormatFamily, NumberFormat

_WEIGHTS = "*weight_quantizer"
_INT4 = {"quantizer_name": _WEIGHTS, "cfg": {"num_bits": 4, "block_sizes": {-1: 128}}}
_FP8_TOKENS = {
    "quantizer_name": "*input_quantizer",
    "cfg": {"num_bits": (4, 3), "axis": None, "type": "dynamic", "block_sizes": {-1: None}},
}
_INT8 = {"quantizer_name": _WEIGHTS, "cfg": {"num_bits": 8, "axis": 0}}
_INT8_TOKENS = {
    "quantizer_name": "*input_quantizer",
    "cfg": {"num_bits": 8, "axis": None, "type": "dynamic", "block_sizes": {-1: None}},
}

INTEGER = FormatFamily(
    inputs=(NumberFormat("int8_token", 8, "token"),),
    weights=(
        NumberFormat(
            "int8",
            8,
            bits=8.0,
            largest=127.0,
            refused="a weight with one scale is not exported; INT8_DEFAULT_CFG has one a channel",
        ),
        NumberFormat(
            "int8_channel",
            8,
            "channel",
            bits=8.0,
            integer=True,
            bf16_scales=True,
            exported_as={
                "int8": "INT8_W8A8",
                "int8_token": "INT8_PER_CHANNEL_PER_TOKEN",
                "": "INT8_W8A16",
            },
        ),
        NumberFormat(
            "int4_block",
            4,
            "block",
            bits=4.125,  # a bf16 scale per 128
            block_size=128,
            integer=True,
            bf16_scales=True,
            exported_as={"": "INT4_W4A16", "fp8_token": "INT4_W4A8"},
        ),
        NumberFormat(
            "int4_block_fp8",
            parts=("int4_block", "fp8"),
            bits=4.125,
            block_size=128,
            bf16_scales=True,
            exported_as={"fp8": "W4A8_AWQ"},
            refused="the scale of a whole matrix is for inputs in FP8; INT4_AWQ_CFG has none",
        ),
    ),
    formats=(
        Format("INT8_DEFAULT_CFG", "int8_channel", "int8"),
        Format("INT8_SMOOTHQUANT_CFG", "int8_channel", "int8", "smoothquant", alias="int8_sq"),
        Format(
            "INT8_PER_CHANNEL_PER_TOKEN_CFG",
            "int8_channel",
            "int8_token",
            alias="int8_pc_pt",
            quant_cfg=(_INT8, _INT8_TOKENS),
        ),
        Format(
            "INT8_SMOOTHQUANT_PER_TOKEN_CFG",
            "int8_channel",
            "int8_token",
            "smoothquant",
            alias="int8_sq_pt",
            quant_cfg=(_INT8, _INT8_TOKENS),
        ),
        Format("INT8_WEIGHT_ONLY_CFG", "int8_channel", alias="int8_wo"),
        Format("INT4_AWQ_CFG", "int4_block", method="awq_lite"),
        Format("INT4_AWQ_CLIP_CFG", "int4_block", method="awq_clip", quant_cfg=(_INT4,)),
        Format("INT4_AWQ_FULL_CFG", "int4_block", method="awq_full", quant_cfg=(_INT4,)),
        Format("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "int4_block"),
        Format("INT4_GPTQ_CFG", "int4_block", method=GPTQ, quant_cfg=(_INT4,)),
        Format("INT8_GPTQ_CFG", "int8_channel", method=GPTQ, quant_cfg=(_INT8,)),
        Format(
            "W4A8_FP8_AWQ_CFG",
            "int4_block",
            "fp8_token",
            "awq_lite",
            quant_cfg=(_INT4, _FP8_TOKENS),
        ),
        Format("W4A8_AWQ_BETA_CFG", "int4_block_fp8", "fp8", "awq_lite", alias="w4a8_awq"),
    ),
)
