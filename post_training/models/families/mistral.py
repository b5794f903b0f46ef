"""Mistral 7B, Nemo, Small and Large: Llama's weights; the first one attends within a window."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from post_training.models.architecture import Architecture
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    ONLY_SILU,
    Family,
    WeightMapping,
    refuse,
)


class Mistral(Family):
    """Every layer attends within ``sliding_window`` tokens where that is a number."""

    # What transformers takes for a file without the key; null is no window.
    absent_window: ClassVar[int | None] = 4096

    def read(self, config: Mapping[str, Any]) -> Architecture:
        return super().read({"sliding_window": self.absent_window, **config})

    def check_windows(self, config: Mapping[str, Any]) -> None:
        super().check_windows(config)
        window = config.get("sliding_window")
        if window is not None and window < config.get("max_position_embeddings", window + 1):
            refuse(
                f"sliding window of {window} tokens",
                "this family's layers all attend to the whole text here",
                "set sliding_window to null if texts stay below the window",
            )

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_llama import (
            llama_causal_lm_export,
            llama_causal_lm_import,
        )

        return WeightMapping(importing=llama_causal_lm_import, exporting=llama_causal_lm_export)


FAMILIES = (
    Mistral(
        name="mistral",
        architecture="MistralForCausalLM",
        refused=(ONLY_SILU,),
        tiny={
            "model_type": "mistral",
            # Nemo's heads are smaller than hidden_size / num_attention_heads.
            "head_dim": 16,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
        defaults={**DECODER_DEFAULTS, "num_key_value_heads": 8},
    ),
)
