"""Nemotron: squared ReLU without a gate, LayerNorm that stores its factor minus one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from post_training.models.families.base import (
    DECODER_KEYS,
    NO_ATTENTION_BIAS,
    NO_MLP_BIAS,
    Family,
    Refused,
    WeightMapping,
)


class Nemotron(Family):
    """A part of each head is rotated; ModelOpt exports its weights, but has no import rules."""

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # What transformers fills in where the key is absent.
        return super().rotary({"partial_rotary_factor": 0.5, **config})

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_custom import (
            COL_TP,
            REPLICATE,
            ROW_TP,
            NameRemapping,
            QKVMerging,
            SelfAttentionScaling,
        )
        from modelopt.torch.export.plugins.mcore_nemotron import nemotron_causal_lm_export

        layer = "model.layers.{}."
        attention = f"{layer}self_attn."
        return WeightMapping(
            importing={
                "word_embeddings": NameRemapping("model.embed_tokens.", COL_TP),
                "input_layernorm": NameRemapping(f"{layer}input_layernorm.", REPLICATE),
                "linear_qkv": QKVMerging(attention, COL_TP),
                "linear_proj": NameRemapping(f"{attention}o_proj.", ROW_TP),
                "pre_mlp_layernorm": NameRemapping(f"{layer}post_attention_layernorm.", REPLICATE),
                "linear_fc1": NameRemapping(f"{layer}mlp.up_proj.", COL_TP),
                "linear_fc2": NameRemapping(f"{layer}mlp.down_proj.", ROW_TP),
                "final_layernorm": NameRemapping("model.norm.", REPLICATE),
                "output_layer": NameRemapping("lm_head.", COL_TP),
            },
            # ModelOpt's rule for the scales of the KV cache has Nemotron-H's names.
            exporting={
                **nemotron_causal_lm_export,
                "core_attention": SelfAttentionScaling(attention),
            },
        )


FAMILIES = (
    Nemotron(
        name="nemotron",
        architecture="NemotronForCausalLM",
        keys={**DECODER_KEYS, "layernorm_epsilon": "norm_eps"},
        constants={
            "normalization": "LayerNorm",
            "layernorm_zero_centered_gamma": True,
            "gated_linear_unit": False,
            "activation_func": "squared_relu",
            "add_bias_linear": False,
        },
        defaults={"norm_eps": 1e-5, "hidden_act": "relu2", "tie_word_embeddings": False},
        refused=(
            Refused("hidden_act", "relu2", "another activation"),
            NO_ATTENTION_BIAS,
            NO_MLP_BIAS,
        ),
        partial_rotary=True,
        tiny={
            "model_type": "nemotron",
            "head_dim": 32,
            "norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
)
