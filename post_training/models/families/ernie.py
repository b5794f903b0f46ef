"""ERNIE 4.5, dense: Llama that rotates neighbouring values of a head instead of its halves."""

from __future__ import annotations

from post_training.models.families.base import (
    DECODER_DEFAULTS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Family,
    Refused,
    WeightMapping,
)


class Ernie(Family):
    """Its weights have Llama's names."""

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_llama import (
            llama_causal_lm_export,
            llama_causal_lm_import,
        )

        return WeightMapping(importing=llama_causal_lm_import, exporting=llama_causal_lm_export)


FAMILIES = (
    Ernie(
        name="ernie4.5",
        architecture="Ernie4_5ForCausalLM",
        constants={**RMSNORM_SWIGLU, "rotary_interleaved": True},
        defaults={
            **DECODER_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
        },
        refused=(ONLY_SILU, Refused("use_bias", False, "biases in every linear layer")),
        tiny={"model_type": "ernie4_5", "head_dim": 64, "tie_word_embeddings": True},
    ),
)
