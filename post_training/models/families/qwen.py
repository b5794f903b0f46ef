"""Qwen2 and Qwen2.5 (biases on query, key and value) and Qwen3 (norms on query and key)."""

from __future__ import annotations

from post_training.models.families.base import (
    DECODER_DEFAULTS,
    NO_ATTENTION_BIAS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Family,
)

_DEFAULTS = {**DECODER_DEFAULTS, "num_key_value_heads": 32, "max_window_layers": 28}

FAMILIES = (
    Family(
        name="qwen2.5",
        architecture="Qwen2ForCausalLM",
        constants={**RMSNORM_SWIGLU, "add_qkv_bias": True},
        defaults=_DEFAULTS,
        refused=(ONLY_SILU,),
        tiny={"model_type": "qwen2", "tie_word_embeddings": True},
    ),
    Family(
        name="qwen3",
        architecture="Qwen3ForCausalLM",
        constants={**RMSNORM_SWIGLU, "qk_layernorm": True},
        defaults={**_DEFAULTS, "head_dim": 128},
        refused=(ONLY_SILU, NO_ATTENTION_BIAS),
        tiny={"model_type": "qwen3", "head_dim": 64, "tie_word_embeddings": True},
    ),
)
