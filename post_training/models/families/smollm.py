"""SmolLM3: Llama with layers whose queries and keys are not rotated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.families.base import (
    DECODER_DEFAULTS,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    ONLY_SILU,
    Family,
    WeightMapping,
    refuse,
)


class SmolLM3(Family):
    """``no_rope_layers`` has a 1 for each layer that is rotated; by default each fourth is not."""

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        given, layers = config.get("no_rope_layers"), config["num_hidden_layers"]
        if given is not None and len(given) < layers:
            refuse(f"no_rope_layers with {len(given)} entries", f"the model has {layers} layers")

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().transformer(config) | {"no_rope_freq": _unrotated(config)}

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        changed = super().with_shape(config, values, kept_layers)
        unrotated = values["no_rope_freq"]
        if isinstance(unrotated, list) and unrotated != _unrotated({**self.defaults, **changed}):
            changed["no_rope_layers"] = [1 - each for each in unrotated]
        return changed

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_llama import (
            llama_causal_lm_export,
            llama_causal_lm_import,
        )

        return WeightMapping(importing=llama_causal_lm_import, exporting=llama_causal_lm_export)


def _unrotated(config: Mapping[str, Any]) -> list[int]:
    """megatron-core's form: 1 for each layer without rotation."""
    layers, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    rotated = config.get("no_rope_layers") or [(n + 1) % interval for n in range(layers)]
    return [int(not each) for each in rotated[:layers]]


FAMILIES = (
    SmolLM3(
        name="smollm3",
        architecture="SmolLM3ForCausalLM",
        defaults={
            **DECODER_DEFAULTS,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "no_rope_layer_interval": 4,
        },
        refused=(ONLY_SILU, NO_ATTENTION_BIAS, NO_MLP_BIAS),
        tiny={"model_type": "smollm3", "tie_word_embeddings": True, "pad_token_id": 0},
    ),
)
