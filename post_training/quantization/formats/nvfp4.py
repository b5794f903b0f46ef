"""NVFP4: E2M1 codes, an E4M3 scale per 16 (or 32) of a row, a float32 scale a tensor."""

from __future__ import annotations

from typing import Any

from post_training.quantization.formats.base import Format, FormatFamily, NumberFormat

_EXPORTED_AS = {"nvfp4": "NVFP4", "": "W4A16_NVFP4"}


def _nvfp4(
    name: str, size: int = 16, blocks: dict[str, Any] | None = None, **more: Any
) -> NumberFormat:
    """A number format with a scale per ``size`` weights, and what else ``block_sizes`` says."""
    return NumberFormat(
        name,
        (2, 1),
        "block",
        {-1: size, "scale_bits": (4, 3), **(blocks or {})},
        bits=4 + 8 / size,
        block_size=size,
        largest=6.0 * 448.0,
        **more,
    )


NVFP4 = FormatFamily(
    weights=(
        _nvfp4(
            "nvfp4_4over6",
            blocks={"four_over_six": True},
            stored_block_scales=True,
            refused="ModelOpt's packer rounds some of its block scales to another value than "
            "calibration did",
        ),
        _nvfp4("nvfp4", blocks={"type": "dynamic"}, exported_as=_EXPORTED_AS),
        _nvfp4("nvfp4_static", stored_block_scales=True, exported_as=_EXPORTED_AS),
        _nvfp4(
            "nvfp4_block32",
            size=32,
            refused="blocks of 32 weights share a scale, and NVFP4 kernels read blocks of 16",
        ),
    ),
    formats=(
        Format("NVFP4_DEFAULT_CFG", "nvfp4", "nvfp4"),
        Format("NVFP4_MLP_ONLY_CFG", "nvfp4", "nvfp4", layers="MLP"),
        Format("NVFP4_OMLP_ONLY_CFG", "nvfp4", "nvfp4", layers="MLP and attention output"),
        Format("NVFP4_EXPERTS_ONLY_CFG", "nvfp4", "nvfp4", layers="experts"),
        Format("MAMBA_MOE_NVFP4_AGGRESSIVE_CFG", "nvfp4", "nvfp4", layers="all but attention"),
        Format(
            "MAMBA_MOE_NVFP4_CONSERVATIVE_CFG",
            "nvfp4",
            "nvfp4",
            layers="all but attention and Mamba",
        ),
        Format(
            "NVFP4_W4A4_WEIGHT_MSE_FP8_SWEEP_CFG", "nvfp4_static", "nvfp4", "mse", alias="nvfp4_mse"
        ),
        Format(
            "NVFP4_W4A4_WEIGHT_LOCAL_HESSIAN_CFG",
            "nvfp4_static",
            "nvfp4",
            "local_hessian",
            alias="nvfp4_local_hessian",
        ),
        Format("NVFP4_FOUR_OVER_SIX_CFG", "nvfp4_4over6", "nvfp4", "mse"),
        Format("NVFP4_AWQ_LITE_CFG", "nvfp4", "nvfp4", "awq_lite", alias="nvfp4_awq"),
        Format("NVFP4_AWQ_CLIP_CFG", "nvfp4", "nvfp4", "awq_clip"),
        Format("NVFP4_AWQ_FULL_CFG", "nvfp4", "nvfp4", "awq_full"),
        Format(
            "NVFP4_SVDQUANT_DEFAULT_CFG",
            "nvfp4",
            "nvfp4",
            "svdquant",
            broken="ModelOpt adds its low-rank product to a tensor, and a Megatron linear returns "
            "a tensor and a bias",
        ),
        Format("NVFP4_FP8_MHA_CONFIG", "nvfp4", "nvfp4", layers="every", kv="fp8", attention=True),
        Format("W4A16_NVFP4_CFG", "nvfp4"),
        Format("NVFP4_MLP_WEIGHT_ONLY_CFG", "nvfp4_block32", layers="MLP"),
        Format("W4A8_NVFP4_FP8_CFG", "nvfp4_block32", "fp8"),
    ),
)
