"""gpt-oss 20b and 120b: attention sinks, alternating windows, biases, clamped experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.families import positions, windows
from post_training.models.families.base import (
    DECODER_KEYS,
    ONLY_SILU,
    Family,
    Refused,
    refuse,
)

# What transformers takes where the file states no rotary scaling.
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


class GptOss(Family):
    """Every layer has experts; layers attend within a window and to the whole text in turn."""

    def check(self, config: Mapping[str, Any]) -> None:
        super().check(config)
        experts, chosen = config["num_local_experts"], config["num_experts_per_tok"]
        if not isinstance(experts, int) or not 1 <= chosen <= experts:
            refuse(f"num_local_experts = {experts!r}", f"each token needs {chosen} of them")

    def check_windows(self, config: Mapping[str, Any]) -> None:
        """Raise UsageError for other kinds of layers than the two, or a window without a size."""
        windows.check(config, _windows(config))

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        layers, within = config["num_hidden_layers"], _windows(config)
        found = super().transformer(config) | windows.fields(config, within)
        if within == windows.every(2, layers):
            found["window_attn_skip_freq"] = 2
        return found | {
            "moe_ffn_hidden_size": config["intermediate_size"],
            "moe_layer_freq": [1] * layers,
        }

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """YaRN's values by the names that megatron-core's GPTModel reads; or no scaling."""
        scaling = positions.rope_scaling(config)
        kind = scaling.get("rope_type", scaling.get("type"))
        base = float({**config, **scaling}.get("rope_theta", 150000.0))
        if kind not in (None, "yarn"):
            return super().rotary({**config, "rope_theta": base})
        if kind is None and {"rope_scaling", "rope_parameters"} & config.keys():
            refuse("rope_parameters without a rope_type", "readers take different ones")
        # What the file leaves out has the values of every family's YaRN.
        stated = {"truncate": True, **scaling} if scaling else _YARN
        return {"rotary_base": base, **positions.yarn(stated)}

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        changed = super().with_shape(config, values, kept_layers)
        layers, within = values["num_layers"], values["window_attn_skip_freq"]
        if within == 2:
            within = windows.every(2, layers)
        within = list(within or [0] * layers)[:layers]
        if within != _windows({**self.defaults, **changed}):
            changed["layer_types"] = windows.types(within)
        return changed


def _windows(config: Mapping[str, Any]) -> list[int]:
    """1 for each layer that attends within the window, 0 for the others."""
    return windows.read(config, windows.every(2, config["num_hidden_layers"]))


FAMILIES = (
    GptOss(
        name="gpt-oss",
        architecture="GptOssForCausalLM",
        keys={
            **DECODER_KEYS,
            "num_moe_experts": "num_local_experts",
            "moe_router_topk": "num_experts_per_tok",
        },
        constants={
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            # x * sigmoid(1.702 x), of which transformers' configuration says "silu".
            "activation_func": "quick_gelu",
            "glu_linear_offset": 1.0,
            "activation_func_clamp_value": 7.0,
            "add_bias_linear": True,
            "softmax_type": "learnable",
            "moe_router_dtype": "fp32",
        },
        defaults={
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
        },
        refused=(
            ONLY_SILU,
            Refused("attention_bias", True, "attention without biases"),
            Refused("swiglu_limit", 7.0, "another limit of the experts' activations"),
        ),
        parts=frozenset({"experts"}),
        # vLLM 0.24.0, model_executor/models/gpt_oss.py, load_weights: every other quant_method is
        # loaded as BF16. The loaders of SGLang and TensorRT-LLM were not read.
        not_quantized="vLLM reads gpt-oss in BF16, its publisher's MXFP4 or Quark's form: its "
        "loader has no place for ModelOpt's scales of experts",
        not_pruned="ModelOpt cuts neither attention sinks nor the pattern of windows",
        tiny={
            "model_type": "gpt_oss",
            "head_dim": 32,
            "intermediate_size": 64,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            # Shorter than the tests' texts, and than what is generated after them.
            "sliding_window": 16,
            "max_position_embeddings": 2048,
            "rope_parameters": {
                **_YARN,
                "rope_theta": 150000.0,
                "original_max_position_embeddings": 64,
            },
            "tie_word_embeddings": False,
        },
    ),
)
