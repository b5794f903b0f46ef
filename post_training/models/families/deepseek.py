"""DeepSeek-V3, R1 and Kimi-K2, DeepSeek-V2 and V2-Lite: latent attention and shared experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from post_training.models.architecture import Architecture
from post_training.models.families import yarn
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Family,
    Refused,
    WeightMapping,
    refuse,
)

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
    "num_moe_experts": "n_routed_experts",
    "moe_router_topk": "num_experts_per_tok",
    "moe_router_topk_scaling_factor": "routed_scaling_factor",
    "moe_ffn_hidden_size": "moe_intermediate_size",
}
_CONSTANTS = {
    **RMSNORM_SWIGLU,
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "moe_router_pre_softmax": True,
    "moe_router_dtype": "fp32",
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


@dataclass(frozen=True, kw_only=True)
class DeepSeek(Family):
    """Dense layers first, then experts with shared ones beside them; multi-latent attention.

    Attributes:
        score: of the router.
        has_bias: whether the router adds a bias to the scores that it chooses by.
        group_experts: how many experts decide which groups a token may choose from.
        methods: values of ``topk_method``, the default first.
    """

    score: str
    has_bias: bool
    group_experts: int
    methods: tuple[str, ...]

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
        chosen = config["num_experts_per_tok"]
        if not 1 <= chosen <= config["n_routed_experts"]:
            refuse(f"num_experts_per_tok = {chosen}", "there are not so many experts")
        if config["first_k_dense_replace"] >= config["num_hidden_layers"]:
            refuse("first_k_dense_replace", "no layer has experts")
        if not config["n_shared_experts"]:
            refuse("n_shared_experts", "a model without shared experts")
        normalized = self.score == "sigmoid" and chosen > 1
        if config["norm_topk_prob"] != normalized:
            refuse(
                f"norm_topk_prob = {config['norm_topk_prob']!r}",
                f"megatron-core {'normalizes' if normalized else 'does not normalize'} the weights "
                f"of {chosen} experts with {self.score} scores",
            )
        if (groups := self._groups(config)) and chosen // groups[1] != self.group_experts:
            refuse(
                f"topk_group = {groups[1]} of {groups[0]} with num_experts_per_tok = {chosen}",
                f"the model ranks groups by their {self.group_experts} best experts, "
                f"megatron-core by {chosen // groups[1]} (num_experts_per_tok / topk_group)",
            )

    def _groups(self, config: Mapping[str, Any]) -> tuple[int, int] | None:
        """Groups of experts, and from how many of them a token chooses; None: from all."""
        method = config.get("topk_method", self.methods[0])
        if method not in self.methods:
            refuse(f"topk_method = {method!r}", f"known are {', '.join(self.methods)}")
        if method == "greedy":
            return None
        groups, chosen = config.get("n_group") or 1, config.get("topk_group") or 1
        return None if chosen >= groups else (groups, chosen)

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
        values = super().transformer(config) | {
            "q_lora_rank": config["q_lora_rank"],
            "num_query_groups": config["num_attention_heads"],
            "moe_layer_freq": [0] * dense + [1] * (layers - dense),
            "moe_shared_expert_intermediate_size": config["n_shared_experts"]
            * config["moe_intermediate_size"],
            "moe_router_score_function": self.score,
            "moe_router_enable_expert_bias": self.has_bias,
        }
        if groups := self._groups(config):
            values["moe_router_num_groups"], values["moe_router_group_topk"] = groups
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
        frequency = values["moe_layer_freq"]
        dense = self.defaults["first_k_dense_replace"]
        if isinstance(frequency, list) and config.get("first_k_dense_replace", dense) != (
            kept := len(frequency) - sum(frequency)
        ):
            changed["first_k_dense_replace"] = kept
        shared, each = values["moe_shared_expert_intermediate_size"], values["moe_ffn_hidden_size"]
        if shared % each:
            refuse(
                f"moe_intermediate_size = {each}",
                f"the shared experts have {shared}, which must be a multiple of it",
                "prune moe_ffn_hidden_size to a divisor, or leave both as they are",
            )
        if config.get("n_shared_experts", self.defaults["n_shared_experts"]) != shared // each:
            changed["n_shared_experts"] = shared // each
        return changed

    def is_carried(self, config: Mapping[str, Any], name: str) -> bool:
        """Layers after the last, which predict further tokens (``num_nextn_predict_layers``)."""
        parts = name.split(".")
        is_layer = parts[:2] == ["model", "layers"] and parts[2].isdecimal()
        return is_layer and int(parts[2]) >= config["num_hidden_layers"]

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
