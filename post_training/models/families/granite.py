"""Granite 3 and later, dense: Llama with four constant factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from post_training.models.architecture import Architecture
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    DECODER_KEYS,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    ONLY_SILU,
    Family,
    WeightMapping,
)


class Granite(Family):
    """One factor is the softmax scale; hooks multiply embeddings, residuals and logits."""

    def read(self, config: Mapping[str, Any]) -> Architecture:
        filled = self._filled(config)
        multipliers = {
            "embedding": filled["embedding_multiplier"],
            "residual": filled["residual_multiplier"],
            "logits_divisor": filled["logits_scaling"],
        }
        return dataclasses.replace(super().read(config), multipliers=multipliers)

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_llama import (
            llama_causal_lm_export,
            llama_causal_lm_import,
        )

        return WeightMapping(importing=llama_causal_lm_import, exporting=llama_causal_lm_export)


FAMILIES = (
    Granite(
        name="granite",
        architecture="GraniteForCausalLM",
        keys={**DECODER_KEYS, "softmax_scale": "attention_multiplier"},
        defaults={
            **DECODER_DEFAULTS,
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
        },
        refused=(ONLY_SILU, NO_ATTENTION_BIAS, NO_MLP_BIAS),
        tiny={
            "model_type": "granite",
            "embedding_multiplier": 12.0,
            "logits_scaling": 0.7,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.125,
            "tie_word_embeddings": True,
        },
    ),
)
