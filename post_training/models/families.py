"""Hugging Face ``config.json`` -> :class:`Architecture`, one entry per family.

``FAMILIES`` is keyed by ``architectures[0]``. An entry names the keys that are copied, the values
that the family always has, the defaults of keys that a file may leave out, and what must not be
there because it cannot be represented. Later families (mixture of experts, multi-latent attention,
hybrid) add entries, with a function for what a table cannot say. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from post_training.common.errors import UsageError, suggest
from post_training.models.architecture import Architecture

_DECODER_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
}
_RMSNORM_SWIGLU = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
}
# Lists with one entry for each layer.
_PER_LAYER_KEYS = ("layer_types", "mlp_layer_types", "no_rope_layers")
# What megatron-core's Llama 3 scaling has fixed (rotary_pos_embedding.py, _apply_scaling).
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class Family:
    """How one architecture's ``config.json`` is read.

    Attributes:
        keys: TransformerConfig field -> key of the file; a key that is absent or null is left to
            megatron-core's default.
        constants: values that every model of the family has.
        defaults: the file's keys that may be absent, with the family's default.
        refused: (key, the only value that can be represented, what another value would mean).
        more: function from the file's content to further TransformerConfig fields.
    """

    keys: Mapping[str, str] = field(default_factory=lambda: _DECODER_KEYS)
    constants: Mapping[str, Any] = field(default_factory=lambda: _RMSNORM_SWIGLU)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    refused: tuple[tuple[str, Any, str], ...] = ()
    more: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}


_SILU = ("hidden_act", "silu", "another activation")
_BIAS = ("attention_bias", False, "a bias in the attention's output projection")
_SHARED_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(
        defaults=_SHARED_DEFAULTS,
        refused=(_SILU, _BIAS, ("mlp_bias", False, "biases in the MLP")),
    ),
    "Qwen2ForCausalLM": Family(
        constants={**_RMSNORM_SWIGLU, "add_qkv_bias": True},
        defaults={**_SHARED_DEFAULTS, "max_window_layers": 28},
        refused=(_SILU,),
    ),
    "Qwen3ForCausalLM": Family(
        constants={**_RMSNORM_SWIGLU, "qk_layernorm": True},
        defaults={**_SHARED_DEFAULTS, "head_dim": 128, "max_window_layers": 28},
        refused=(_SILU, _BIAS),
    ),
}


def from_huggingface(config: Mapping[str, Any]) -> Architecture:
    """The architecture that the content of a ``config.json`` describes.

    Raises:
        UsageError: for an unknown architecture, weights that are already quantized, or a value
            that megatron-core cannot represent; each by name.
    """
    name = (config.get("architectures") or [None])[0]
    family = FAMILIES.get(name)
    if family is None:
        raise UsageError(
            f"config.json: architectures = {config.get('architectures')!r}",
            f"known are {', '.join(sorted(FAMILIES))}",
            suggest(str(name), FAMILIES) or "convert a model of one of the known architectures",
        )
    refuse_quantized(config)
    config = {**family.defaults, **{k: v for k, v in config.items() if v is not None}}
    for key, only, meaning in family.refused:
        if config.get(key, only) != only:
            _refuse(f"{key} = {config[key]!r}", f"{meaning}; only {only!r} can be represented")
    _refuse_sliding_window(config)
    transformer = dict(family.constants)
    transformer |= {f: config[k] for f, k in family.keys.items() if k in config}
    transformer |= family.more(config)
    for key in ("num_hidden_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(key), int):
            _refuse(f"{key} = {config.get(key)!r}", "a whole number is needed")
    return Architecture(
        transformer=transformer,
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings", 2048),
        share_embeddings_and_output_weights=bool(config["tie_word_embeddings"]),
        huggingface_architecture=name,
        **rotary(config),
    )


def with_shape(
    config: Mapping[str, Any], values: Mapping[str, Any], kept_layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """``config`` with the sizes of a pruned model, under the family's own keys.

    Args:
        config: content of the ``config.json`` of the model before pruning, or already adapted.
        values: TransformerConfig fields of the model, nothing left to follow from others.
        kept_layers: numbers of the kept layers, from 1; by default the first ones.
    """
    changed = dict(config)
    family = FAMILIES.get((config.get("architectures") or [None])[0], Family())
    layers = config.get(family.keys["num_layers"])
    # What a file that leaves the head size out means by it.
    head_size = family.defaults.get(
        "head_dim", values["hidden_size"] // values["num_attention_heads"]
    )
    for field_name, key in family.keys.items():
        now, before = values.get(field_name), config.get(key)
        if before is None and key == "head_dim":
            before = head_size
        if now is not None and before is not None and now != before:
            changed[key] = now
    if layers is not None and layers != values["num_layers"]:
        kept = kept_layers or range(1, values["num_layers"] + 1)
        for key in _PER_LAYER_KEYS:
            if isinstance(config.get(key), list) and len(config[key]) == layers:
                changed[key] = [config[key][number - 1] for number in kept]
    return changed


def unconvertible(stated: Mapping[str, Any]) -> str | None:
    """Why a model that flags describe cannot be read from Hugging Face yet; None if it can.

    For a hub name, whose ``config.json`` is not here: better said now than after the download.
    """
    parts = {
        "experts": stated.get("num_moe_experts"),
        "multi-latent attention": stated.get("multi_latent_attention"),
        "Mamba layers": stated.get("hybrid_layer_pattern") or stated.get("is_hybrid_model"),
    }
    found = [name for name, there in parts.items() if there]
    if not found:
        return None
    return f"it has {' and '.join(found)}, and only {', '.join(sorted(FAMILIES))} are converted yet"


def rotary(config: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture's rotary values from either form of the file.

    transformers 5 writes ``rope_parameters`` with ``rope_theta`` inside; earlier versions wrote
    ``rope_theta`` and ``rope_scaling`` (null without scaling) at the top level.

    Raises:
        UsageError: for a scaling other than Llama 3's with megatron-core's fixed constants.
    """
    scaling = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    base = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    percent = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    values = {"rotary_base": float(base), "rotary_percent": float(percent)}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return values
    if kind != "llama3":
        _refuse(f"rope type {kind!r}", "only 'default' and 'llama3' can be represented so far")
    for key, fixed in _LLAMA3_SCALING.items():
        if scaling.get(key, fixed) != fixed:
            _refuse(
                f"rope scaling {key} = {scaling[key]!r}",
                f"megatron-core's Llama 3 scaling has it fixed at {fixed!r}",
            )
    return values | {"rope_scaling": True, "rope_scaling_factor": float(scaling["factor"])}


def refuse_quantized(config: Mapping[str, Any], source: str = "config.json") -> None:
    """Raise UsageError if the weights described by ``config`` are already quantized."""
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return
    method = found.get("quant_method") or "unknown method"
    detail = found.get("quant_algo") or found.get("format") or found.get("fmt")
    if found.get("bits"):
        detail = f"{found['bits']} bits"
    raise UsageError(
        f"{source}: quantization_config with quant_method {method}"
        + (f" ({detail})" if detail else ""),
        "the weights are already quantized, and converting them would read codes as values",
        "take the unquantized (BF16) release of the model, or dequantize it first",
    )


def _refuse_sliding_window(config: Mapping[str, Any]) -> None:
    """Windows that no layer uses are fine; others cannot be represented for these families."""
    sliding = "sliding_attention" in config.get("layer_types", [])
    if config.get("use_sliding_window") and "layer_types" not in config:
        sliding = config.get("max_window_layers", 0) < config.get("num_hidden_layers", 0)
    if sliding:
        _refuse(
            f"sliding window of {config.get('sliding_window')} tokens",
            "this family's layers all attend to the whole text here",
            "set use_sliding_window to false if texts stay below the window",
        )


def _refuse(what: str, cause: str, remedy: str = "convert another model of this family") -> None:
    raise UsageError(f"config.json: {what}", cause, remedy)
