"""Mixtral 8x7B and 8x22B: Mistral's attention, experts in place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from post_training.models.families.base import (
    DECODER_DEFAULTS,
    DECODER_KEYS,
    ONLY_SILU,
    WeightMapping,
    check_router,
    refuse,
)
from post_training.models.families.mistral import Mistral


class Mixtral(Mistral):
    """Every layer has experts, whose three matrices are called w1, w2 and w3."""

    absent_window: ClassVar[int | None] = None

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        experts = config["num_local_experts"]
        if config.get("num_experts", experts) != experts:
            refuse(f"num_experts = {config['num_experts']!r}", f"num_local_experts is {experts}")
        check_router(experts, config["num_experts_per_tok"], normalized=True)

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().transformer(config) | {
            "moe_ffn_hidden_size": config["intermediate_size"],
            "moe_layer_freq": [1] * config["num_hidden_layers"],
        }

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        sizes = {**values, "ffn_hidden_size": values["moe_ffn_hidden_size"]}
        return super().with_shape(config, sizes, kept_layers)

    def weight_mapping(self) -> WeightMapping:
        return weight_mapping()


def weight_mapping() -> WeightMapping:
    """Rules for the weights, experts' names included."""
    from modelopt.torch.export.plugins.mcore_custom import (
        COL_ETP,
        ROW_ETP,
        GatedMLPMerging,
        GatedMLPSlicing,
        NameRemapping,
    )
    from modelopt.torch.export.plugins.mcore_llama import (
        llama_causal_lm_export,
        llama_causal_lm_import,
    )

    mlp = "model.layers.{}.block_sparse_moe."
    expert, names = f"{mlp}experts.{{}}.", {"gate_proj_name": "w1", "up_proj_name": "w3"}
    return WeightMapping(
        importing={
            **llama_causal_lm_import,
            "router": NameRemapping(f"{mlp}gate."),
            "local_experts.linear_fc1": GatedMLPMerging(expert, {**COL_ETP, **names}),
            "local_experts.linear_fc2": NameRemapping(f"{expert}w2.", ROW_ETP),
        },
        exporting={
            **llama_causal_lm_export,
            "router": NameRemapping(f"{mlp}gate."),
            "local_experts.linear_fc1": GatedMLPSlicing(expert, names),
            "local_experts.linear_fc2": NameRemapping(f"{expert}w2."),
        },
    )


FAMILIES = (
    Mixtral(
        name="mixtral",
        architecture="MixtralForCausalLM",
        keys={
            **DECODER_KEYS,
            "num_moe_experts": "num_local_experts",
            "moe_router_topk": "num_experts_per_tok",
        },
        defaults={
            **DECODER_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        refused=(ONLY_SILU,),
        parts=frozenset({"experts"}),
        tiny={
            "model_type": "mixtral",
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "tie_word_embeddings": False,
        },
    ),
)
