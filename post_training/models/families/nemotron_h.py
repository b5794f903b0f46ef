"""Nemotron-H and Nemotron 3: layers of Mamba-2, of attention without positions, and of MLPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from post_training.models.architecture import Architecture
from post_training.models.families.base import (
    DECODER_KEYS,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    Family,
    Refused,
    WeightMapping,
    check_groups,
    check_router,
    refuse,
)

# What layers_block_type calls a layer, its names of earlier versions included -> megatron-core's
# letter for it.
_KINDS = {
    **{"linear_attention": "M", "mamba": "M", "mamba2": "M"},
    **{"full_attention": "*", "attention": "*"},
    **{"mlp": "-", "dense": "-", "moe": "E", "sparse": "E"},
}
# Names that the first published files have for keys.
_EARLIER = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_limit": "time_step_limit",
    "mamba_conv_bias": "use_conv_bias",
}
_OF_EXPERTS = {
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_ffn_hidden_size": "moe_intermediate_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "moe_latent_size": "moe_latent_size",
}
_LIMITS = (0.0, math.inf)
_PATTERN = "hybrid_override_pattern"


class NemotronH(Family):
    """A layer has one part, which ``hybrid_override_pattern`` or ``layers_block_type`` names."""

    def read(self, config: Mapping[str, Any]) -> Architecture:
        found = super().read(config)
        pattern = self._filled(config)[_PATTERN]
        return replace(found, model_type="HybridModel", hybrid_layer_pattern=pattern)

    def _filled(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """With the layers as a pattern, whose length is their number whatever the file says."""
        named = {_EARLIER.get(key, key): value for key, value in config.items()}
        filled = super()._filled(named)
        kinds = filled.get("layers_block_type", filled.get("layer_types"))
        if kinds is None:
            kinds = [*filled.get(_PATTERN, "ME*-")]
        unknown = sorted({*kinds} - _KINDS.keys() - {*_KINDS.values()})
        if unknown or not kinds:
            refuse(f"layers {', '.join(unknown)}", f"known are {', '.join(_KINDS)}")
        pattern = "".join(_KINDS.get(kind, kind) for kind in kinds)
        return {**filled, _PATTERN: pattern, "num_hidden_layers": len(pattern)}

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        if (limits := [_number(each) for each in config["time_step_limit"]]) != [*_LIMITS]:
            refuse(f"time_step_limit = {limits}", f"megatron-core has it fixed at {[*_LIMITS]}")
        heads, groups = config["mamba_num_heads"], config["n_groups"]
        if heads % groups:
            refuse(f"mamba_num_heads = {heads}", f"{groups} groups (n_groups) do not divide them")
        if "E" in config[_PATTERN]:
            self._check_experts(config)

    def _check_experts(self, config: Mapping[str, Any]) -> None:
        chosen = config["num_experts_per_tok"]
        check_router(config["n_routed_experts"], chosen, normalized=config["norm_topk_prob"])
        if config["norm_topk_prob"] != (chosen > 1):
            refuse("norm_topk_prob = False", "megatron-core normalizes the weights of experts")
        if config["topk_group"] < config["n_group"]:
            groups = config["n_group"], config["topk_group"]
            check_groups(config["n_routed_experts"], *groups, ranked=2)
        if config["topk_group"] < config["n_group"] and chosen // config["topk_group"] != 2:
            refuse(
                f"topk_group = {config['topk_group']} with num_experts_per_tok = {chosen}",
                "the model ranks groups by their 2 best experts, megatron-core by "
                "num_experts_per_tok / topk_group",
            )

    def check_windows(self, config: Mapping[str, Any]) -> None:
        """Its ``layer_types`` are no windows, and its attention is never within one."""

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = super().transformer(config)
        if "E" not in config[_PATTERN]:
            return {name: value for name, value in found.items() if name not in _OF_EXPERTS}
        found |= {
            "moe_router_score_function": "sigmoid",
            "moe_router_pre_softmax": True,
            "moe_router_enable_expert_bias": True,
            "moe_router_dtype": "fp32",
        }
        if config["topk_group"] < config["n_group"]:
            found["moe_router_num_groups"] = config["n_group"]
            found["moe_router_group_topk"] = config["topk_group"]
        return found

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """No positions: the Mamba layers keep the order. Keys of a rotation have no meaning."""
        return {"position_embedding_type": "none"}

    def is_carried(self, config: Mapping[str, Any], name: str) -> bool:
        """Layers that predict further tokens (``num_nextn_predict_layers``)."""
        return name.startswith("mtp.")

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_nemotron import (
            nemotron_h_causal_lm_export,
            nemotron_h_causal_lm_import,
        )

        return WeightMapping(nemotron_h_causal_lm_import, nemotron_h_causal_lm_export)


def _number(value: Any) -> Any:
    """transformers writes infinity as an object."""
    return float(value["__float__"]) if isinstance(value, Mapping) else value


FAMILIES = (
    NemotronH(
        name="nemotron-h",
        architecture="NemotronHForCausalLM",
        keys={
            **DECODER_KEYS,
            **_OF_EXPERTS,
            "layernorm_epsilon": "layer_norm_epsilon",
            "mamba_num_heads": "mamba_num_heads",
            "mamba_head_dim": "mamba_head_dim",
            "mamba_num_groups": "n_groups",
            "mamba_state_dim": "ssm_state_size",
        },
        constants={
            "normalization": "RMSNorm",
            "gated_linear_unit": False,
            "activation_func": "squared_relu",
            "add_bias_linear": False,
            "is_hybrid_model": True,
        },
        defaults={
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": False,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "n_groups": 8,
            "ssm_state_size": 128,
            "time_step_limit": [*_LIMITS],
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 7688,
            "moe_shared_expert_intermediate_size": 7688,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
        },
        refused=(
            NO_ATTENTION_BIAS,
            NO_MLP_BIAS,
            Refused("use_bias", False, "biases in the projections of Mamba layers"),
            Refused("use_conv_bias", True, "Mamba layers without the bias of their convolution"),
            Refused("mamba_hidden_act", "silu", "another activation in Mamba layers"),
            Refused("mlp_hidden_act", "relu2", "another activation"),
            Refused("layer_norm_epsilon", 1e-5, "norms that megatron-core's Mamba layers lack"),
            Refused("conv_kernel", 4, "another width of the convolution"),
            Refused("residual_in_fp32", False, "residuals in another dtype than the weights"),
            Refused("tie_word_embeddings", False, "an output layer that transformers does not tie"),
            Refused("n_shared_experts", 1, "another number of shared experts"),
        ),
        parts=frozenset({"experts", "Mamba layers"}),
        # transformers 5.14 saves the embedding under a name that no engine reads.
        other_names={"backbone.embeddings.weight": "backbone.embedding.weight"},
        tiny={
            "model_type": "nemotron_h",
            _PATTERN: "M-M*EM",
            "head_dim": 32,
            "layer_norm_epsilon": 1e-5,
            "mamba_num_heads": 8,
            "mamba_head_dim": 24,
            "n_groups": 2,
            "ssm_state_size": 16,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "moe_shared_expert_intermediate_size": 96,
            "moe_latent_size": 64,  # of Nemotron 3 Super and Ultra
            "routed_scaling_factor": 2.5,
            "n_group": 4,
            "topk_group": 2,
            # transformers 5.14 has no cache for models with layers of MLPs alone.
            "use_cache": False,
        },
    ),
)
