"""Gated delta nets in most layers, attention with a gated output in the others: Qwen's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.families.base import (
    DECODER_DEFAULTS,
    RMSNORM_SWIGLU,
    Family,
    WeightMapping,
    refuse,
)

_LINEAR, _FULL = "linear_attention", "full_attention"
KEYS = {
    "linear_conv_kernel_dim": "linear_conv_kernel_dim",
    "linear_key_head_dim": "linear_key_head_dim",
    "linear_value_head_dim": "linear_value_head_dim",
    "linear_num_key_heads": "linear_num_key_heads",
    "linear_num_value_heads": "linear_num_value_heads",
}
CONSTANTS = {
    **RMSNORM_SWIGLU,
    "layernorm_zero_centered_gamma": True,
    "qk_layernorm": True,
    "attention_output_gate": True,
}
DEFAULTS = {
    **DECODER_DEFAULTS,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "max_position_embeddings": 32768,
}
NOT_PRUNED = "ModelOpt cuts of gated delta nets only the hidden size"
TINY = {
    "head_dim": 64,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "full_attention_interval": 3,  # both kinds on each stage of 3 + 3 and 4 + 2 layers
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
    },
    "tie_word_embeddings": False,
}


class DeltaNets(Family):
    """``layer_types``, or ``full_attention_interval``, says which layers have attention."""

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
        for name in KEYS:
            if type(config[name]) is not int or config[name] < 1:
                refuse(f"{name} = {config[name]!r}", "a whole number from 1 on is needed")
        if values % keys:
            refuse(f"linear_num_value_heads = {values}", f"{keys} heads of keys do not divide them")

    def check_windows(self, config: Mapping[str, Any]) -> None:
        """Its ``layer_types`` are no windows."""
        types, layers = config.get("layer_types"), config["num_hidden_layers"]
        if types and (len(types) < layers or not {*types} <= {_LINEAR, _FULL}):
            refuse(f"layer_types = {types!r}", f"{layers} layers need '{_LINEAR}' or '{_FULL}'")
        interval = config.get("full_attention_interval", 4)
        if type(interval) is not int or interval < 1:
            refuse(f"full_attention_interval = {interval!r}", "a whole number is needed")

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found, layers = super().transformer(config), _linear(config)
        if not any(layers):
            return {name: value for name, value in found.items() if name not in KEYS}
        return found | {
            "experimental_attention_variant": "gated_delta_net",
            "linear_attention_freq": layers,
        }

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # What transformers fills in where the key is absent.
        return super().rotary({"partial_rotary_factor": 0.25, **config})

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        changed = super().with_shape(config, values, kept_layers)
        found = values["linear_attention_freq"] or [0] * values["num_layers"]
        if found != _linear(changed):
            changed["layer_types"] = [_LINEAR if each else _FULL for each in found]
        return changed

    def is_carried(self, config: Mapping[str, Any], name: str) -> bool:
        """Layers that predict further tokens."""
        return name.startswith("mtp.") or super().is_carried(config, name)

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_custom import (
            COL_TP,
            ROW_TP,
            GatedMLPMerging,
            GatedMLPSlicing,
            NameRemapping,
        )
        from modelopt.torch.export.plugins.mcore_qwen import (
            qwen3_causal_lm_export,
            qwen3_causal_lm_import,
        )

        layer = "model.layers.{}."
        shared, own = f"{layer}mlp.shared_expert.", f"{layer}linear_attn."
        gate = NameRemapping(f"{layer}mlp.shared_expert_gate.weight")
        names = {"conv1d": "conv1d.weight", "norm": "norm.weight", "A_log": "A_log"}
        names |= {"dt_bias": "dt_bias"}
        names |= {name: f"{name}." for name in ("in_proj", "in_proj_ba", "out_proj")}
        return WeightMapping(
            {
                **qwen3_causal_lm_import,
                "linear_attn": NameRemapping(own),
                "shared_experts.linear_fc1": GatedMLPMerging(shared, COL_TP),
                "shared_experts.linear_fc2": NameRemapping(f"{shared}down_proj.", ROW_TP),
                "shared_experts.gate_weight": gate,
            },
            {
                **qwen3_causal_lm_export,
                "linear_attn": NameRemapping(own),
                **{f"linear_attn.{n}": NameRemapping(f"{own}{each}") for n, each in names.items()},
                "shared_experts.linear_fc1": GatedMLPSlicing(shared),
                "shared_experts.linear_fc2": NameRemapping(f"{shared}down_proj."),
                "shared_experts.gate_weight": gate,
            },
        )


def _linear(config: Mapping[str, Any]) -> list[int]:
    """1 for each layer with a gated delta net, 0 for each with attention."""
    layers, interval = config["num_hidden_layers"], config.get("full_attention_interval", 4)
    if types := config.get("layer_types"):
        return [int(each == _LINEAR) for each in types[:layers]]
    return [int((layer + 1) % interval != 0) for layer in range(layers)]
