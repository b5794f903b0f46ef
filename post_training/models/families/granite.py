"""Granite 3 and later, dense and with experts: Llama with four constant factors."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
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
    check_router,
    refuse,
)
from post_training.models.families.stacked import StackedExperts


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


# vLLM reads each expert of its own too, by Mixtral's names (granitemoe.py, load_weights).
_STACKED = StackedExperts(
    "input_linear.weight", "output_linear.weight", inputs_first=False, one=("w1", "w3", "w2")
)


class GraniteMoe(Granite):
    """Every layer has experts, and beside them a shared one where the file states its size.

    The gate and up of the shared one are one matrix.
    """

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        check_router(config["num_local_experts"], config["num_experts_per_tok"], normalized=True)
        shared = config.get("shared_intermediate_size", 0)
        if type(shared) is not int or shared < 0:
            refuse(f"shared_intermediate_size = {shared!r}", "a whole number is needed")

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = super().transformer(config) | {
            "moe_ffn_hidden_size": config["intermediate_size"],
            "moe_layer_freq": [1] * config["num_hidden_layers"],
        }
        shared = config.get("shared_intermediate_size", 0) if self.has_shared else 0
        return found | ({"moe_shared_expert_intermediate_size": shared} if shared else {})

    @property
    def has_shared(self) -> bool:
        return "shared_intermediate_size" in self.defaults

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        sizes = {**values, "ffn_hidden_size": values["moe_ffn_hidden_size"]}
        changed = super().with_shape(config, sizes, kept_layers)
        shared = values["moe_shared_expert_intermediate_size"] or 0
        if self.has_shared and self._filled(config)["shared_intermediate_size"] != shared:
            changed["shared_intermediate_size"] = shared
        return changed

    def joined(self, values: Mapping[str, Any]) -> Mapping[str, Mapping[str, int]]:
        shared = values["moe_shared_expert_intermediate_size"]
        parts = {"gate_proj": shared, "up_proj": shared}
        return {"input_linear": parts} if self.has_shared and shared else {}

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_custom import (
            COL_TP,
            ROW_TP,
            GatedMLPMerging,
            GatedMLPSlicing,
            NameRemapping,
        )

        rules, layer = super().weight_mapping(), "model.layers.{}."
        importing, exporting = _STACKED.rules(f"{layer}block_sparse_moe.")
        shared = f"{layer}shared_mlp."
        router = NameRemapping(f"{layer}block_sparse_moe.router.layer.")
        return WeightMapping(
            {
                **rules.importing,
                **importing,
                "router": router,
                "shared_experts.linear_fc1": GatedMLPMerging(shared, COL_TP),
                "shared_experts.linear_fc2": NameRemapping(f"{shared}output_linear.", ROW_TP),
            },
            {
                **rules.exporting,
                **exporting,
                "router": router,
                "shared_experts.linear_fc1": GatedMLPSlicing(shared),
                "shared_experts.linear_fc2": NameRemapping(f"{shared}output_linear."),
            },
        )


_KEYS = {**DECODER_KEYS, "softmax_scale": "attention_multiplier"}
_DEFAULTS = {
    **DECODER_DEFAULTS,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
}
_REFUSED = (ONLY_SILU, NO_ATTENTION_BIAS, NO_MLP_BIAS)
_TINY = {
    "embedding_multiplier": 12.0,
    "logits_scaling": 0.7,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.125,
    "tie_word_embeddings": True,
}
_MOE: dict[str, Any] = {
    "keys": {
        **_KEYS,
        "num_moe_experts": "num_local_experts",
        "moe_router_topk": "num_experts_per_tok",
    },
    "refused": _REFUSED,
    "parts": frozenset({"experts"}),
    "stacked": _STACKED,
}
_MOE_DEFAULTS = {**_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}
_TINY_MOE = {**_TINY, "intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2}
FAMILIES = (
    Granite(
        name="granite",
        architecture="GraniteForCausalLM",
        keys=_KEYS,
        defaults=_DEFAULTS,
        refused=_REFUSED,
        tiny={"model_type": "granite", **_TINY},
    ),
    GraniteMoe(
        name="granite-moe",
        architecture="GraniteMoeForCausalLM",
        defaults=_MOE_DEFAULTS,
        tiny={"model_type": "granitemoe", **_TINY_MOE},
        **_MOE,
    ),
    GraniteMoe(
        name="granite-moe-shared",
        architecture="GraniteMoeSharedForCausalLM",
        defaults={**_MOE_DEFAULTS, "shared_intermediate_size": 0},
        tiny={"model_type": "granitemoeshared", **_TINY_MOE, "shared_intermediate_size": 256},
        **_MOE,
    ),
)
