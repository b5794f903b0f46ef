"""Qwen3.5, dense and with experts: the text model, alone or within a model that sees images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.families import gated_delta, vision
from post_training.models.families.base import (
    DECODER_KEYS,
    NO_ATTENTION_BIAS,
    ONLY_SILU,
    Refused,
    WeightMapping,
    refuse,
)
from post_training.models.families.gated_delta import DeltaNets
from post_training.models.families.qwen_moe import Qwen3Moe
from post_training.models.families.stacked import StackedExperts

_PREFIX = "model.language_model."


class Qwen35(DeltaNets):
    """Its files have the rows of all heads together, in four linears.

    Positions of a text are the same in all three dimensions of its rotation, which is then a plain
    one.
    """

    def text(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return vision.text(config) if self.prefix else dict(config)

    def divided(self, values: Mapping[str, Any]) -> Mapping[str, Mapping[str, Sequence[int]]]:
        heads = values["linear_num_value_heads"]
        inner = heads * values["linear_value_head_dim"]
        mixed = 2 * values["linear_num_key_heads"] * values["linear_key_head_dim"] + inner
        return {
            "in_proj": {"in_proj_qkv": range(mixed), "in_proj_z": range(mixed, mixed + inner)},
            "in_proj_ba": {"in_proj_b": range(heads), "in_proj_a": range(heads, 2 * heads)},
        }

    def is_carried(self, config: Mapping[str, Any], name: str) -> bool:
        """What sees images, and layers that predict further tokens."""
        return name.startswith(("mtp.", "model.visual."))

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_custom import with_language_model_prefix

        rules = super().weight_mapping()
        importing, exporting = dict(rules.importing), dict(rules.exporting)
        if self.stacked:
            experts = self.stacked.rules("model.layers.{}.mlp.")
            importing, exporting = {**importing, **experts[0]}, {**exporting, **experts[1]}
        if self.prefix:
            importing, exporting = map(with_language_model_prefix, (importing, exporting))
        return WeightMapping(importing, exporting)


class Qwen35Moe(Qwen35, Qwen3Moe):
    """Every layer has Qwen3-MoE's experts beside a shared one."""

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        if config["decoder_sparse_step"] != 1:
            refuse(f"decoder_sparse_step = {config['decoder_sparse_step']!r}", "no layer is dense")


_REFUSED = (
    ONLY_SILU,
    NO_ATTENTION_BIAS,
    Refused("attn_output_gate", True, "attention whose output is not gated"),
)
_KEYS = {**DECODER_KEYS, **gated_delta.KEYS}
_DENSE: dict[str, Any] = {
    "keys": _KEYS,
    "constants": gated_delta.CONSTANTS,
    "defaults": {**gated_delta.DEFAULTS, "num_key_value_heads": 4},
    "refused": _REFUSED,
    "parts": frozenset({"gated delta nets"}),
    "partial_rotary": True,
    "not_pruned": gated_delta.NOT_PRUNED,
}
_MOE: dict[str, Any] = {
    **_DENSE,
    "keys": {
        **{name: key for name, key in _KEYS.items() if name != "ffn_hidden_size"},
        "moe_ffn_hidden_size": "moe_intermediate_size",
        "moe_router_topk": "num_experts_per_tok",
        "moe_shared_expert_intermediate_size": "shared_expert_intermediate_size",
    },
    "constants": {**gated_delta.CONSTANTS, "moe_shared_expert_gate": True},
    "defaults": {
        **gated_delta.DEFAULTS,
        "num_key_value_heads": 2,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "num_experts": 256,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
    },
    "refused": (
        *_REFUSED,
        Refused("norm_topk_prob", True, "weights of experts that do not sum to 1"),
        Refused("mlp_only_layers", [], "dense layers, which transformers' model has not"),
    ),
    "parts": frozenset({"experts", "gated delta nets"}),
}
_TINY_MOE = {
    **gated_delta.TINY,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 256,
}
# Embeddings of the smaller models are tied.
_TINY = {**gated_delta.TINY, "tie_word_embeddings": True}
FAMILIES = (
    Qwen35(
        name="qwen3.5",
        architecture="Qwen3_5ForCausalLM",
        tiny={"model_type": "qwen3_5_text", **_TINY},
        **_DENSE,
    ),
    Qwen35(
        name="qwen3.5-vision",
        architecture="Qwen3_5ForConditionalGeneration",
        prefix=_PREFIX,
        tiny={
            "model_type": "qwen3_5",
            "tie_word_embeddings": True,
            "text_config": {"model_type": "qwen3_5_text", **_TINY},
        },
        **_DENSE,
    ),
    Qwen35Moe(
        name="qwen3.5-moe",
        architecture="Qwen3_5MoeForCausalLM",
        tiny={"model_type": "qwen3_5_moe_text", **_TINY_MOE},
        **_MOE,
    ),
    Qwen35Moe(
        name="qwen3.5-moe-vision",
        architecture="Qwen3_5MoeForConditionalGeneration",
        prefix=_PREFIX,
        # As published; quantized ones have each expert of its own, as transformers saves all.
        stacked=StackedExperts("experts.gate_up_proj", "experts.down_proj", inputs_first=False),
        tiny={
            "model_type": "qwen3_5_moe",
            "text_config": {"model_type": "qwen3_5_moe_text", **_TINY_MOE},
        },
        **_MOE,
    ),
)
