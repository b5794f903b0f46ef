"""GLM-4.5 and later with experts: half of each head rotated, DeepSeek-V3's router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.families import shared_experts
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    DECODER_KEYS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    WeightMapping,
)
from post_training.models.families.shared_experts import SharedExperts


class Glm4Moe(SharedExperts):
    """Attention is Qwen3's, or Qwen2.5's with its biases, or both; experts are DeepSeek's."""

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # What transformers fills in where the key is absent.
        return super().rotary({"partial_rotary_factor": 0.5, **config})

    def is_carried(self, config: Mapping[str, Any], name: str) -> bool:
        predicts = config.get("num_nextn_predict_layers", 1) != 0
        return predicts and super().is_carried(config, name)

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """A pruned model has no layers for further tokens, since nothing cuts them."""
        changed = super().with_shape(config, values, kept_layers)
        return changed if changed == config else {**changed, "num_nextn_predict_layers": 0}

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_deepseek import (
            deepseek_causal_lm_export,
            deepseek_causal_lm_import,
        )
        from modelopt.torch.export.plugins.mcore_qwen import (
            qwen3_causal_lm_export,
            qwen3_causal_lm_import,
        )

        experts = [name for name in deepseek_causal_lm_import if "expert" in name] + ["router"]
        return WeightMapping(
            {**qwen3_causal_lm_import, **{n: deepseek_causal_lm_import[n] for n in experts}},
            {**qwen3_causal_lm_export, **{n: deepseek_causal_lm_export[n] for n in experts}},
        )


FAMILIES = (
    Glm4Moe(
        name="glm4-moe",
        architecture="Glm4MoeForCausalLM",
        score="sigmoid",
        has_bias=True,
        group_experts=2,
        methods=("noaux_tc",),
        keys={
            **DECODER_KEYS,
            **shared_experts.KEYS,
            "add_qkv_bias": "attention_bias",
            "qk_layernorm": "use_qk_norm",
        },
        constants={**RMSNORM_SWIGLU, **shared_experts.CONSTANTS},
        defaults={
            **DECODER_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
            "attention_bias": False,
            "use_qk_norm": False,
            "moe_intermediate_size": 1408,
            "num_experts_per_tok": 8,
            "n_shared_experts": 1,
            "n_routed_experts": 128,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
        },
        refused=(ONLY_SILU,),
        parts=frozenset({"experts"}),
        partial_rotary=True,
        tiny={
            "model_type": "glm4_moe",
            "head_dim": 64,
            "attention_bias": True,
            "use_qk_norm": True,
            "moe_intermediate_size": 128,
            "n_routed_experts": 8,
            "num_experts_per_tok": 4,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 2,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
            "tie_word_embeddings": False,
        },
    ),
)
