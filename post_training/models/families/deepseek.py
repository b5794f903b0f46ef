"""DeepSeek-V3, R1 and Kimi-K2, DeepSeek-V2 and V2-Lite: latent attention and shared experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.architecture import Architecture
from post_training.models.families import shared_experts, yarn
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Refused,
    WeightMapping,
    refuse,
)
from post_training.models.families.shared_experts import SharedExperts

_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "layernorm_epsilon": "rms_norm_eps",
    "kv_lora_rank": "kv_lora_rank",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    **shared_experts.KEYS,
}
_CONSTANTS = {
    **RMSNORM_SWIGLU,
    **shared_experts.CONSTANTS,
    "multi_latent_attention": True,
    "qk_layernorm": True,
}
_DEFAULTS = {
    **DECODER_DEFAULTS,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
_REFUSED = (
    ONLY_SILU,
    NO_ATTENTION_BIAS,
    # transformers' norms of the latents have 1e-6 whatever the file says, engines the file's.
    Refused("rms_norm_eps", 1e-6, "norms for which transformers and engines differ"),
    Refused("moe_layer_freq", 1, "dense layers between those with experts"),
    Refused("rope_interleave", True, "rotary pairs that are not side by side"),
)
# Without the factors that transformers 5.14 leaves out of DeepSeek-V2's softmax scale.
_TINY_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 40,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_TINY = {
    "num_key_value_heads": 4,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 40,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 320,
    "rope_parameters": {**_TINY_ROPE, "mscale": 0.707, "mscale_all_dim": 0.9},
    "tie_word_embeddings": False,
}


class DeepSeek(SharedExperts):
    """Multi-latent attention beside shared experts."""

    def read(self, config: Mapping[str, Any]) -> Architecture:
        # A rank that is null means queries without a latent; one that is absent has the default.
        found = super().read(config)
        if config.get("q_lora_rank", 0) is None:
            found.transformer["q_lora_rank"] = None
        return found

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        heads = config["num_attention_heads"]
        if config.get("num_key_value_heads", heads) != heads:
            refuse(
                f"{heads} attention heads with num_key_value_heads = "
                f"{config['num_key_value_heads']!r}",
                "each head has keys and values of its own in latent attention",
            )

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        values = super().transformer(config) | {
            "q_lora_rank": config["q_lora_rank"],
            "num_query_groups": config["num_attention_heads"],
        }
        return values | yarn.latent_positions(config)

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        stated = {**config, **yarn.scaling(config)}
        if (share := stated.get("partial_rotary_factor", 1.0)) != 1.0:
            what = f"partial_rotary_factor = {share!r}"
            refuse(what, "the rotary part of a head is qk_rope_head_dim")
        return {"rotary_base": float(stated.get("rope_theta", 10000.0))}

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        changed = super().with_shape(config, values, kept_layers)
        if changed.get("num_key_value_heads") is not None:
            changed["num_key_value_heads"] = values["num_attention_heads"]
        return changed

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_deepseek import (
            deepseek_causal_lm_export,
            deepseek_causal_lm_import,
        )

        from post_training.models import transformers_names

        # ModelOpt's importer and exporter read config.json with transformers.
        transformers_names.register()
        return WeightMapping(deepseek_causal_lm_import, deepseek_causal_lm_export)


FAMILIES = (
    DeepSeek(
        name="deepseek-v3",
        architecture="DeepseekV3ForCausalLM",
        score="sigmoid",
        has_bias=True,
        group_experts=2,
        methods=("noaux_tc",),
        keys=_KEYS,
        constants=_CONSTANTS,
        defaults={
            **_DEFAULTS,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "routed_scaling_factor": 2.5,
            "n_group": 8,
            "topk_group": 4,
            "first_k_dense_replace": 3,
            "norm_topk_prob": True,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 128,
        },
        refused=(
            *_REFUSED,
            Refused("scoring_func", "sigmoid", "another score of the router"),
        ),
        parts=frozenset({"experts", "multi-latent attention"}),
        tiny={
            **_TINY,
            "model_type": "deepseek_v3",
            "n_shared_experts": 1,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
        },
    ),
    DeepSeek(
        name="deepseek-v2",
        architecture="DeepseekV2ForCausalLM",
        score="softmax",
        has_bias=False,
        group_experts=1,
        methods=("greedy", "group_limited_greedy"),
        keys=_KEYS,
        constants=_CONSTANTS,
        defaults={
            **_DEFAULTS,
            "moe_intermediate_size": 1407,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "norm_topk_prob": False,
        },
        refused=(
            *_REFUSED,
            NO_MLP_BIAS,
            Refused("scoring_func", "softmax", "another score of the router"),
        ),
        parts=frozenset({"experts", "multi-latent attention"}),
        tiny={
            **_TINY,
            "model_type": "deepseek_v2",
            "n_shared_experts": 2,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 3,
            "q_lora_rank": None,
            "rope_parameters": _TINY_ROPE,
        },
    ),
)
