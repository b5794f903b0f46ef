"""Qwen3-MoE (Qwen3-30B-A3B, Qwen3-235B-A22B): Qwen3's attention, experts in place of the MLP."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.families.base import (
    DECODER_DEFAULTS,
    DECODER_KEYS,
    NO_ATTENTION_BIAS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Family,
    check_router,
    refuse,
)


class Qwen3Moe(Family):
    """Some layers may have a dense MLP (``mlp_only_layers``, ``decoder_sparse_step``).

    transformers 5 writes the number of experts as ``num_local_experts``, published files have
    ``num_experts``.
    """

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        chosen, normalized = config["num_experts_per_tok"], config["norm_topk_prob"]
        check_router(_experts(config), chosen, normalized=normalized)
        if not any(_pattern(config)):
            refuse("mlp_only_layers", "no layer has experts")

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().transformer(config) | {
            "num_moe_experts": _experts(config),
            "moe_layer_freq": _pattern(config),
            # The softmax over the chosen experts alone is the normalized one over all.
            "moe_router_pre_softmax": not config["norm_topk_prob"],
        }

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        changed = super().with_shape(config, values, kept_layers)
        experts = values["num_moe_experts"]
        for key in ("num_experts", "num_local_experts"):
            if config.get(key) not in (None, experts):
                changed[key] = experts
        frequency, layers = values["moe_layer_freq"], values["num_layers"]
        if isinstance(frequency, int):
            frequency = [int(layer % frequency == 0) for layer in range(layers)]
        if frequency != _pattern({**self.defaults, **changed}):
            changed["decoder_sparse_step"] = 1
            changed["mlp_only_layers"] = [n for n, sparse in enumerate(frequency) if not sparse]
        return changed


def _experts(config: Mapping[str, Any]) -> Any:
    found = {config[key] for key in ("num_experts", "num_local_experts") if key in config}
    if len(found) > 1:
        refuse("num_experts and num_local_experts", f"they differ: {sorted(found)}")
    return next(iter(found), 128)


def _pattern(config: Mapping[str, Any]) -> list[int]:
    """1 for each layer with experts, 0 for each dense one."""
    dense, step = config.get("mlp_only_layers") or (), config["decoder_sparse_step"]
    return [
        int(layer not in dense and (layer + 1) % step == 0)
        for layer in range(config["num_hidden_layers"])
    ]


FAMILIES = (
    Qwen3Moe(
        name="qwen3-moe",
        architecture="Qwen3MoeForCausalLM",
        keys={
            **DECODER_KEYS,
            "moe_ffn_hidden_size": "moe_intermediate_size",
            "moe_router_topk": "num_experts_per_tok",
        },
        constants={**RMSNORM_SWIGLU, "qk_layernorm": True},
        defaults={
            **DECODER_DEFAULTS,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "decoder_sparse_step": 1,
        },
        refused=(ONLY_SILU, NO_ATTENTION_BIAS),
        parts=frozenset({"experts"}),
        tiny={
            "model_type": "qwen3_moe",
            "head_dim": 64,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "norm_topk_prob": True,
            "mlp_only_layers": [1],
            "tie_word_embeddings": False,
        },
    ),
)
