"""Llama 4 Scout and Maverick: the text model, alone or within a model that sees images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.architecture import Architecture
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    DECODER_KEYS,
    NO_ATTENTION_BIAS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Family,
    WeightMapping,
    refuse,
)
from post_training.models.families.stacked import StackedExperts

# vLLM reads them one by one too (llama4.py, load_weights).
_STACKED = StackedExperts("experts.gate_up_proj", "experts.down_proj", inputs_first=True)
_CHUNKED, _FULL = "chunked_attention", "full_attention"
_KEYS = {
    **DECODER_KEYS,
    "ffn_hidden_size": "intermediate_size_mlp",
    "moe_ffn_hidden_size": "intermediate_size",
    "num_moe_experts": "num_local_experts",
    "moe_router_topk": "num_experts_per_tok",
}
_CONSTANTS = {
    **RMSNORM_SWIGLU,
    "rotary_interleaved": True,
    "moe_router_score_function": "sigmoid",
    "moe_apply_probs_on_input": True,
}
_DEFAULTS = {
    **DECODER_DEFAULTS,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1,
    "no_rope_layer_interval": 4,
    "use_qk_norm": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "max_position_embeddings": 131072,
}
_TINY = {
    "head_dim": 32,
    "intermediate_size": 64,
    "intermediate_size_mlp": 192,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "no_rope_layer_interval": 3,
    # Both shorter than the tests' texts, and no divisors of their length.
    "attention_chunk_size": 20,
    "floor_scale": 10,
    "attn_scale": 0.3,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


class Llama4(Family):
    """Layers with experts and dense ones; rotated layers attend within chunks, others to all."""

    def read(self, config: Mapping[str, Any]) -> Architecture:
        stated = self.text(config)
        found = super().read(config)
        filled = self._filled(stated)
        chunks = temperature = None
        if any(layers := _chunked(filled)):
            size = stated.get("attention_chunk_size", 8192)
            if type(size) is not int or size < 1:
                refuse(f"attention_chunk_size = {size!r}", "layers attend within chunks")
            chunks = {"size": size, "layers": layers}
        if filled.get("attn_temperature_tuning", True):
            temperature = {"floor_scale": filled["floor_scale"], "scale": filled["attn_scale"]}
        return dataclasses.replace(
            found, attention_chunks=chunks, attention_temperature=temperature
        )

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        if "intermediate_size" not in config:
            refuse("intermediate_size = None", "the size of the experts is needed")
        experts, chosen = config["num_local_experts"], config["num_experts_per_tok"]
        if chosen != 1 or experts < 1:
            refuse(
                f"num_experts_per_tok = {chosen!r} of {experts!r}",
                "megatron-core multiplies the input of an expert only where a token has one",
            )
        layers = config["num_hidden_layers"]
        for key in ("no_rope_layers", "layer_types"):
            if config.get(key) and len(config[key]) < layers:
                refuse(f"{key} with {len(config[key])} entries", f"the model has {layers} layers")
        if not any(_sparse(config)):
            refuse("moe_layers", "no layer has experts")

    def check_windows(self, config: Mapping[str, Any]) -> None:
        others = set(config.get("layer_types") or ()) - {_CHUNKED, _FULL}
        if others:
            refuse(f"layer_types with {', '.join(sorted(others))}", "chunks and all are known")

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().transformer(config) | {
            "moe_layer_freq": _sparse(config),
            "moe_shared_expert_intermediate_size": config["intermediate_size"],
            "no_rope_freq": [int(not rotated) for rotated in _rotated(config)],
            "qk_l2_norm": config["use_qk_norm"],
            # megatron-core takes the L2 norm only beside it.
            "qk_layernorm": config["use_qk_norm"],
        }

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        changed = super().with_shape(config, values, kept_layers)
        if values["num_layers"] != config["num_hidden_layers"]:
            changed["moe_layers"] = [
                n for n, sparse in enumerate(values["moe_layer_freq"]) if sparse
            ]
            changed["no_rope_layers"] = [int(not each) for each in values["no_rope_freq"]]
        return changed

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_custom import (
            COL_TP,
            REPLICATE,
            ROW_TP,
            GatedMLPMerging,
            GatedMLPSlicing,
            NameRemapping,
            QKVMerging,
            QKVSlicing,
            SelfAttentionScaling,
        )

        layer = f"{self.prefix}model.layers.{{}}."
        attention, mlp = f"{layer}self_attn.", f"{layer}feed_forward."
        shared = f"{mlp}shared_expert."
        # Name -> tensor, how it is divided. No rule for the whole experts: importer.py divides.
        plain = {
            "word_embeddings": (f"{self.prefix}model.embed_tokens.", COL_TP),
            "input_layernorm": (f"{layer}input_layernorm.", REPLICATE),
            "fused_input_layernorm": (f"{layer}input_layernorm.weight", {}),
            "linear_proj": (f"{attention}o_proj.", ROW_TP),
            "pre_mlp_layernorm": (f"{layer}post_attention_layernorm.", REPLICATE),
            "fused_pre_mlp_layernorm": (f"{layer}post_attention_layernorm.weight", {}),
            "linear_fc2": (f"{mlp}down_proj.", ROW_TP),
            "shared_experts.linear_fc2": (f"{shared}down_proj.", ROW_TP),
            "router": (f"{mlp}router.", REPLICATE),
            "final_layernorm": (f"{self.prefix}model.norm.", REPLICATE),
            "output_layer": (f"{self.prefix}lm_head.", COL_TP),
        }
        gated = {"linear_fc1": mlp, "shared_experts.linear_fc1": shared}
        importing_experts, exporting_experts = _STACKED.rules(mlp)
        return WeightMapping(
            importing={
                **{name: NameRemapping(*rule) for name, rule in plain.items()},
                **{name: GatedMLPMerging(prefix, COL_TP) for name, prefix in gated.items()},
                "linear_qkv": QKVMerging(attention, COL_TP),
                **importing_experts,
            },
            exporting={
                **{name: NameRemapping(prefix) for name, (prefix, _) in plain.items()},
                **{name: GatedMLPSlicing(prefix) for name, prefix in gated.items()},
                "linear_qkv": QKVSlicing(attention),
                "core_attention": SelfAttentionScaling(attention),
                **exporting_experts,
            },
        )


def _rotated(config: Mapping[str, Any]) -> list[int]:
    """1 for each layer whose queries and keys are rotated."""
    layers, interval = config["num_hidden_layers"], config["no_rope_layer_interval"]
    given = config.get("no_rope_layers") or [int((n + 1) % interval != 0) for n in range(layers)]
    return [int(bool(each)) for each in given[:layers]]


def _chunked(config: Mapping[str, Any]) -> list[int]:
    """1 for each layer that attends within chunks."""
    types = config.get("layer_types")
    if types is None:
        return _rotated(config)
    return [int(each == _CHUNKED) for each in types[: config["num_hidden_layers"]]]


def _sparse(config: Mapping[str, Any]) -> list[int]:
    """1 for each layer with experts, 0 for each dense one."""
    layers, step = config["num_hidden_layers"], config["interleave_moe_layer_step"]
    chosen = config.get("moe_layers", range(step - 1, layers, step))
    return [int(layer in chosen) for layer in range(layers)]


_SHARED: dict[str, Any] = {
    "keys": _KEYS,
    "constants": _CONSTANTS,
    "defaults": _DEFAULTS,
    "refused": (ONLY_SILU, NO_ATTENTION_BIAS),
    "parts": frozenset({"experts"}),
    "stacked": _STACKED,
    # vLLM's llama4.py, permute_qk_weight_for_rotary.
    "weights_read": ("fp8", "nvfp4"),
    "weights_reason": "vLLM reorders the rows of Llama 4's queries and keys while loading, but of "
    "their scales only NVFP4's",
    "not_pruned": "ModelOpt cuts neither the layers' pattern of rotation nor experts in one tensor",
}
FAMILIES = (
    Llama4(
        name="llama4",
        architecture="Llama4ForCausalLM",
        tiny={"model_type": "llama4_text", **_TINY},
        **_SHARED,
    ),
    Llama4(
        name="llama4-vision",
        architecture="Llama4ForConditionalGeneration",
        prefix="language_model.",
        tiny={"model_type": "llama4", "text_config": {"model_type": "llama4_text", **_TINY}},
        **_SHARED,
    ),
)
