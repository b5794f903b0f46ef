"""Gemma 3, its text models: norms on both sides, windows whose layers are rotated by another base.

Norms store their weight less one, embeddings are multiplied by the root of the hidden size, and
scores are divided by a root that the file states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.architecture import Architecture
from post_training.models.families import positions, windows
from post_training.models.families.base import (
    NO_ATTENTION_BIAS,
    RMSNORM_SWIGLU,
    Family,
    Refused,
    WeightMapping,
)


class Gemma3(Family):
    """One layer of six attends to the whole text, unless the file says otherwise."""

    def read(self, config: Mapping[str, Any]) -> Architecture:
        found = super().read(config)
        multipliers = {
            "embedding": found.transformer["hidden_size"] ** 0.5,
            "rounded": True,  # in bf16 55.4256 is 55.5 in transformers and in engines
            "residual": 1.0,
            "logits_divisor": 1.0,
        }
        return dataclasses.replace(found, post_norms=True, multipliers=multipliers)

    def check_windows(self, config: Mapping[str, Any]) -> None:
        """Raise UsageError for other kinds of layers than the two, or a window without a size."""
        windows.check(config, self._windows(config))

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = super().transformer(config) | windows.fields(config, self._windows(config))
        return found | {"softmax_scale": float(config["query_pre_attn_scalar"]) ** -0.5}

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        local = config.get("rope_local_base_freq", 10000.0)
        full, local = positions.of_each_kind(config, 1000000.0, local)
        return super().rotary(full) | {"local_rotary_base": local}

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        changed = super().with_shape(config, values, kept_layers)
        layers = values["num_layers"]
        found = list(values["window_attn_skip_freq"] or [0] * layers)[:layers]
        if found != self._windows({**self.defaults, **changed}):
            changed["layer_types"] = windows.types(found)
        return changed

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_custom import REPLICATE, NameRemapping
        from modelopt.torch.export.plugins.mcore_qwen import (
            qwen3_causal_lm_export,
            qwen3_causal_lm_import,
        )

        names = {
            "post_self_attn_layernorm": "post_attention_layernorm",
            "pre_mlp_layernorm": "pre_feedforward_layernorm",
            "post_mlp_layernorm": "post_feedforward_layernorm",
        }
        stored = {name: f"model.layers.{{}}.{each}." for name, each in names.items()}
        # In Transformer Engine's layers.
        fused = {"fused_pre_mlp_layernorm": NameRemapping(f"{stored['pre_mlp_layernorm']}weight")}
        return WeightMapping(
            {
                **qwen3_causal_lm_import,
                **{n: NameRemapping(each, REPLICATE) for n, each in stored.items()},
                **fused,
            },
            {
                **qwen3_causal_lm_export,
                **{n: NameRemapping(each) for n, each in stored.items()},
                **fused,
            },
        )

    def _windows(self, config: Mapping[str, Any]) -> list[int]:
        full = config.get("sliding_window_pattern", 6)
        return windows.read(config, windows.every(full, config["num_hidden_layers"]))


_CAPPED = "scores or logits that are capped"
FAMILIES = (
    Gemma3(
        name="gemma3",
        architecture="Gemma3ForCausalLM",
        constants={
            **RMSNORM_SWIGLU,
            "activation_func": "fast_gelu",  # the approximation by tanh
            "layernorm_zero_centered_gamma": True,
            "qk_layernorm": True,
        },
        defaults={
            "rms_norm_eps": 1e-6,
            "hidden_activation": "gelu_pytorch_tanh",
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
        },
        refused=(
            NO_ATTENTION_BIAS,
            Refused("hidden_activation", "gelu_pytorch_tanh", "another activation"),
            Refused("attn_logit_softcapping", None, _CAPPED),
            Refused("final_logit_softcapping", None, _CAPPED),
            Refused("use_bidirectional_attention", False, "attention to later tokens too"),
        ),
        not_pruned="ModelOpt does not cut the norms after attention and MLP",
        tiny={
            "model_type": "gemma3_text",
            "head_dim": 64,
            "query_pre_attn_scalar": 48,
            # Shorter than the tests' texts, and than what is generated after them.
            "sliding_window": 16,
            "sliding_window_pattern": 3,
            "rope_parameters": {
                windows.SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
                windows.FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
            },
            "bos_token_id": None,
            "eos_token_id": 0,
            "tie_word_embeddings": True,
        },
    ),
)
