"""MiniMax-M2: experts chosen as DeepSeek-V3 chooses, queries and keys normalized as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.architecture import Architecture
from post_training.models.families import mixtral
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    DECODER_KEYS,
    NO_ATTENTION_BIAS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Family,
    Refused,
    WeightMapping,
    check_router,
    is_further_layer,
    refuse,
)


class MiniMaxM2(Family):
    """Every layer has experts, with Mixtral's names, and the router's bias beside the router.

    ``rotary_dim`` of published files says how much of a head is rotated, as in the model's own code
    and in vLLM; transformers 5.14 does not know it, and rotates the whole head.
    """

    def read(self, config: Mapping[str, Any]) -> Architecture:
        return dataclasses.replace(super().read(config), full_width_qk_norms=True)

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        experts = config["num_local_experts"]
        if config.get("num_experts", experts) != experts:
            refuse(f"num_experts = {config['num_experts']!r}", f"num_local_experts is {experts}")
        check_router(experts, config["num_experts_per_tok"], normalized=True)
        if set(config.get("attn_type_list", [1])) != {1}:
            refuse("attn_type_list", "some layers have lightning attention, which is not computed")

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = super().rotary(config)
        if "rotary_dim" not in config:
            return found
        rope = {**config, **(config.get("rope_scaling") or config.get("rope_parameters") or {})}
        share = config["rotary_dim"] / config["head_dim"]
        if rope.get("partial_rotary_factor", share) != share:
            what = f"partial_rotary_factor = {rope['partial_rotary_factor']!r}"
            refuse(what, f"rotary_dim is {config['rotary_dim']} of {config['head_dim']}")
        return {**found, "rotary_percent": float(share)}

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

    def is_carried(self, config: Mapping[str, Any], name: str) -> bool:
        """Layers after the last, which predict further tokens."""
        return is_further_layer(config, name)

    def stored_name(self, name: str) -> str:
        """A rule of ModelOpt's has one prefix for a router and its bias."""
        return name.replace(".gate.e_score_correction_bias", ".e_score_correction_bias")

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_custom import COL_TP, NameRemapping

        importing, exporting = mixtral.weight_mapping()
        attention = "model.layers.{}.self_attn."
        gate = "model.layers.{}.block_sparse_moe.gate."
        bias = {"mapping": {"expert_bias": "e_score_correction_bias"}}
        rules = {
            "q_layernorm": (f"{attention}q_norm.", COL_TP),
            "k_layernorm": (f"{attention}k_norm.", COL_TP),
        }
        return WeightMapping(
            {
                **importing,
                **{name: NameRemapping(*each) for name, each in rules.items()},
                "router": NameRemapping(gate, bias),
            },
            {
                **exporting,
                **{name: NameRemapping(prefix) for name, (prefix, _) in rules.items()},
                "router": NameRemapping(gate, bias),
            },
        )


FAMILIES = (
    MiniMaxM2(
        name="minimax-m2",
        architecture="MiniMaxM2ForCausalLM",
        keys={
            **DECODER_KEYS,
            "num_moe_experts": "num_local_experts",
            "moe_router_topk": "num_experts_per_tok",
        },
        constants={
            **RMSNORM_SWIGLU,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_dtype": "fp32",
        },
        defaults={
            **DECODER_DEFAULTS,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rope_theta": 5e6,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
        },
        refused=(
            ONLY_SILU,
            NO_ATTENTION_BIAS,
            Refused("scoring_func", "sigmoid", "another score of the router"),
            Refused("use_routing_bias", True, "a router without a bias"),
            Refused("use_qk_norm", True, "queries and keys that are not normalized"),
            Refused("qk_norm_type", "per_layer", "norms of each head"),
            Refused("shared_intermediate_size", 0, "shared experts"),
        ),
        parts=frozenset({"experts"}),
        partial_rotary=True,
        not_pruned="ModelOpt does not cut the norms of all heads' queries and keys",
        tiny={
            "model_type": "minimax_m2",
            "head_dim": 64,
            "intermediate_size": 128,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "scoring_func": "sigmoid",
            "use_routing_bias": True,
            "rotary_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
            "bos_token_id": None,
            "eos_token_id": 0,
            "tie_word_embeddings": False,
        },
    ),
)
