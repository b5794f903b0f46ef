"""Llama 2, 3, 3.1 and 3.2, and models that use their architecture."""

from __future__ import annotations

from post_training.models.families.base import NO_ATTENTION_BIAS, NO_MLP_BIAS, ONLY_SILU, Family

FAMILIES = (
    Family(
        name="llama3",
        architecture="LlamaForCausalLM",
        refused=(ONLY_SILU, NO_ATTENTION_BIAS, NO_MLP_BIAS),
        tiny={
            "model_type": "llama",
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
    ),
)
