"""NVFP4: E2M1 codes, an E4M3 scale per 16 (or 32) of a row, a float32 scale a tensor."""

from __future__ import annotations

from typing import Any

from post_training.quantization.formats.base import (
    FormatFamily,
    NumberFormat,
    block_sizes,
    linear_format,
)

_E2M1, _E4M3 = (2, 1), (4, 3)
_LARGEST = 6.0 * 448.0


def _has_blocks_of(size: int, quantizer: Any) -> bool:
    blocks = block_sizes(quantizer)
    is_nvfp4 = quantizer.num_bits == _E2M1 and blocks.get("scale_bits") == _E4M3
    return is_nvfp4 and blocks.get(-1) == size


def _is_four_over_six(quantizer: Any) -> bool:
    return _has_blocks_of(16, quantizer) and bool(block_sizes(quantizer).get("four_over_six"))


def _is_nvfp4(quantizer: Any) -> bool:
    return _has_blocks_of(16, quantizer) and block_sizes(quantizer).get("type") == "dynamic"


def _is_static(quantizer: Any) -> bool:
    return _has_blocks_of(16, quantizer)


def _is_block32(quantizer: Any) -> bool:
    return _has_blocks_of(32, quantizer)


NVFP4 = FormatFamily(
    weights=(
        NumberFormat(
            "nvfp4_4over6",
            _is_four_over_six,
            bits=4.5,
            block_size=16,
            largest=_LARGEST,
            stored_block_scales=True,
            refused="ModelOpt's packer rounds some of its block scales to another value than "
            "calibration did",
        ),
        NumberFormat(
            "nvfp4",
            _is_nvfp4,
            bits=4.5,  # an E4M3 scale per 16
            block_size=16,
            largest=_LARGEST,
            exported_as={"nvfp4": "NVFP4", "": "W4A16_NVFP4"},
        ),
        NumberFormat(
            "nvfp4_static",
            _is_static,
            bits=4.5,
            block_size=16,
            largest=_LARGEST,
            stored_block_scales=True,
            exported_as={"nvfp4": "NVFP4", "": "W4A16_NVFP4"},
        ),
        NumberFormat(
            "nvfp4_block32",
            _is_block32,
            bits=4.25,
            block_size=32,
            largest=_LARGEST,
            refused="blocks of 32 weights share a scale, and NVFP4 kernels read blocks of 16",
        ),
    ),
    formats=(
        linear_format("NVFP4_DEFAULT_CFG", "nvfp4", "nvfp4", "nvfp4"),
        linear_format("NVFP4_MLP_ONLY_CFG", "nvfp4_mlp_only", "nvfp4", "nvfp4", layers="MLP"),
        linear_format(
            "NVFP4_OMLP_ONLY_CFG",
            "nvfp4_omlp_only",
            "nvfp4",
            "nvfp4",
            layers="MLP and attention output",
        ),
        linear_format(
            "NVFP4_EXPERTS_ONLY_CFG", "nvfp4_experts_only", "nvfp4", "nvfp4", layers="experts"
        ),
        linear_format(
            "MAMBA_MOE_NVFP4_AGGRESSIVE_CFG",
            "mamba_moe_nvfp4_aggressive",
            "nvfp4",
            "nvfp4",
            layers="all but attention",
        ),
        linear_format(
            "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG",
            "mamba_moe_nvfp4_conservative",
            "nvfp4",
            "nvfp4",
            layers="all but attention and Mamba",
        ),
        linear_format(
            "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG",
            "nvfp4_w4a4_weight_mse_fp8_sweep nvfp4_mse",
            "nvfp4_static",
            "nvfp4",
            "mse",
        ),
        linear_format(
            "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG",
            "nvfp4_w4a4_weight_local_hessian nvfp4_local_hessian",
            "nvfp4_static",
            "nvfp4",
            "local_hessian",
        ),
        linear_format(
            "NVFP4_FOUR_OVER_SIX_CFG", "nvfp4_four_over_six", "nvfp4_4over6", "nvfp4", "mse"
        ),
        linear_format(
            "NVFP4_AWQ_LITE_CFG", "nvfp4_awq_lite nvfp4_awq", "nvfp4", "nvfp4", "awq_lite"
        ),
        linear_format("NVFP4_AWQ_CLIP_CFG", "nvfp4_awq_clip", "nvfp4", "nvfp4", "awq_clip"),
        linear_format("NVFP4_AWQ_FULL_CFG", "nvfp4_awq_full", "nvfp4", "nvfp4", "awq_full"),
        linear_format(
            "NVFP4_SVDQUANT_DEFAULT_CFG",
            "nvfp4_svdquant",
            "nvfp4",
            "nvfp4",
            "svdquant",
            broken="ModelOpt adds its low-rank product to a tensor, and a Megatron linear returns "
            "a tensor and a bias",
        ),
        linear_format(
            "NVFP4_FP8_MHA_CONFIG",
            "nvfp4_fp8_mha",
            "nvfp4",
            "nvfp4",
            layers="every",
            kv="fp8",
            attention=True,
        ),
        linear_format("W4A16_NVFP4_CFG", "w4a16_nvfp4", "nvfp4"),
        linear_format(
            "NVFP4_MLP_WEIGHT_ONLY_CFG", "nvfp4_mlp_weight_only", "nvfp4_block32", layers="MLP"
        ),
        linear_format("W4A8_NVFP4_FP8_CFG", "w4a8_nvfp4_fp8", "nvfp4_block32", "fp8"),
    ),
)
