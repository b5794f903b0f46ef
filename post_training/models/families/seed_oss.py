"""Seed-OSS: Qwen2.5's biases on query, key and value, and a head size of its own."""

from __future__ import annotations

from post_training.models.families.base import (
    DECODER_DEFAULTS,
    NO_MLP_BIAS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Family,
    Refused,
    WeightMapping,
)


class SeedOss(Family):
    """Its weights have Qwen2.5's names."""

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_qwen import (
            qwen25_causal_lm_export,
            qwen25_causal_lm_import,
        )

        return WeightMapping(importing=qwen25_causal_lm_import, exporting=qwen25_causal_lm_export)


FAMILIES = (
    SeedOss(
        name="seed-oss",
        architecture="SeedOssForCausalLM",
        constants={**RMSNORM_SWIGLU, "add_qkv_bias": True},
        defaults={**DECODER_DEFAULTS, "head_dim": 128, "num_key_value_heads": 8},
        refused=(
            ONLY_SILU,
            Refused("attention_bias", True, "query, key and value without biases"),
            Refused("attention_out_bias", False, "a bias in the attention's output projection"),
            NO_MLP_BIAS,
        ),
        tiny={"model_type": "seed_oss", "head_dim": 64, "tie_word_embeddings": False},
    ),
)
