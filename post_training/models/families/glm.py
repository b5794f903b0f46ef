"""GLM-4-9B of 2024 and GLM-4-0414: half of each head rotated, in neighbouring pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from post_training.models.architecture import Architecture
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Family,
    Refused,
    WeightMapping,
)


class Glm(Family):
    """Gate and up are one matrix; the other weights have Qwen2.5's names, and its biases."""

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # What transformers fills in where the key is absent.
        return super().rotary({"partial_rotary_factor": 0.5, **config})

    def joined(self, values: Mapping[str, Any]) -> Mapping[str, Mapping[str, int]]:
        ffn = values["ffn_hidden_size"]
        return {"gate_up_proj": {"gate_proj": ffn, "up_proj": ffn}}

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_qwen import (
            qwen25_causal_lm_export,
            qwen25_causal_lm_import,
        )

        return WeightMapping(importing=qwen25_causal_lm_import, exporting=qwen25_causal_lm_export)


class Glm4(Glm):
    """Norms of what attention and MLP give as well as of what they get."""

    def read(self, config: Mapping[str, Any]) -> Architecture:
        return dataclasses.replace(super().read(config), post_norms=True)

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_custom import REPLICATE, NameRemapping

        importing, exporting = super().weight_mapping()
        names = {
            name: f"model.layers.{{}}.{name}."
            for name in ("post_self_attn_layernorm", "post_mlp_layernorm")
        }
        return WeightMapping(
            {**importing, **{n: NameRemapping(each, REPLICATE) for n, each in names.items()}},
            {**exporting, **{n: NameRemapping(each) for n, each in names.items()}},
        )


_SHARED: dict[str, Any] = {
    "constants": {**RMSNORM_SWIGLU, "add_qkv_bias": True, "rotary_interleaved": True},
    "defaults": {
        **DECODER_DEFAULTS,
        "rms_norm_eps": 1.5625e-7,
        "num_key_value_heads": 2,
        "head_dim": 128,
    },
    "refused": (
        ONLY_SILU,
        Refused("attention_bias", True, "query, key and value without biases"),
    ),
    "partial_rotary": True,
}
_TINY = {
    "head_dim": 64,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
    },
    "pad_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = (
    Glm(
        name="glm",
        architecture="GlmForCausalLM",
        tiny={"model_type": "glm", **_TINY},
        **_SHARED,
    ),
    Glm4(
        name="glm4",
        architecture="Glm4ForCausalLM",
        not_pruned="ModelOpt does not cut the norms after attention and MLP",
        tiny={"model_type": "glm4", **_TINY},
        **_SHARED,
    ),
)
