"""What a model family is: how one Hugging Face architecture is read, written back and tested.

A family is one :class:`Family` in one file of this folder, and one row in ``registry.py``. What a
table can say (keys, constants, defaults, refusals) are fields; what it cannot (rotary variants, the
frequency of expert layers, multi-latent attention) is a method that a subclass overrides.
``docs/extending.md`` adds a family step by step. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from post_training.models.architecture import Architecture
from post_training.models.families import positions
from post_training.models.families.refusal import Refused as Refused
from post_training.models.families.refusal import refuse as refuse
from post_training.models.families.routers import check_groups as check_groups
from post_training.models.families.routers import check_router as check_router
from post_training.models.families.stacked import StackedExperts

# TransformerConfig field -> key of config.json, of a decoder like Llama's.
DECODER_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "layernorm_epsilon": "rms_norm_eps",
}
RMSNORM_SWIGLU = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "activation_func": "silu",
    "add_bias_linear": False,
}
DECODER_DEFAULTS = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
# Fields that count something; a file states at least the first ones.
_NEEDED = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads")
_COUNTS = (
    *(*_NEEDED, "num_query_groups", "kv_channels"),
    *("num_moe_experts", "moe_ffn_hidden_size", "moe_router_topk", "moe_latent_size"),
    *("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "mamba_state_dim"),
    *("kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim"),
)
# A null there means what megatron-core derives, and not the family's default.
_DERIVED = ("num_key_value_heads", "head_dim")
# Sizes of the tiny models of the tests. Six layers, so that 4 + 2 is an uneven pipeline split.
TINY_SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}


_CAUSAL = Refused("is_causal", True, "attention to later tokens too")
ONLY_SILU = Refused("hidden_act", "silu", "another activation")
NO_ATTENTION_BIAS = Refused("attention_bias", False, "a bias in the attention's output projection")
NO_MLP_BIAS = Refused("mlp_bias", False, "biases in the MLP")


class WeightMapping(NamedTuple):
    """Module name -> ModelOpt's ``CustomModuleMapping``, as in its export/plugins/mcore_*.py."""

    importing: Mapping[str, Any]
    exporting: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Family:
    """How the models of one Hugging Face architecture are read, written back and tested.

    Attributes:
        name: short, for people and tests, such as ``qwen3``.
        architecture: ``architectures[0]`` of the models' ``config.json``.
        keys: TransformerConfig field -> key of the file; a key that is absent or null is left to
            megatron-core's default.
        constants: TransformerConfig values that every model of the family has.
        defaults: the file's keys that may be absent, with the family's default.
        refused: what cannot be represented.
        parts: what its models may have beyond a dense decoder, of ``registry.PARTS``.
        per_layer_keys: keys that hold a list with one entry for each layer.
        partial_rotary: its models heed ``partial_rotary_factor``.
        not_quantized: why no engine reads its models with quantized weights; empty: engines do.
        weights_read: number formats of quantized weights in which engines read its models, where
            they do not read all; ``weights_reason`` says why.
        not_pruned: why its models cannot be pruned; empty: they can.
        prefix: of the text model's tensors, where its keys are in ``text_config``: the model sees
            images too. What is not below it is carried.
        other_names: tensors of the files -> what transformers saves them as, where it is not the
            published name. Both are read; the published one is written.
        stacked: how its files name experts that are one tensor a layer.
        tiny: keys of a tiny model for the tests, ``model_type`` included; the sizes are
            ``TINY_SIZES`` where it does not give them. Switch the family's peculiarities on.
    """

    name: str
    architecture: str
    tiny: Mapping[str, Any]
    keys: Mapping[str, str] = field(default_factory=lambda: DECODER_KEYS)
    constants: Mapping[str, Any] = field(default_factory=lambda: RMSNORM_SWIGLU)
    defaults: Mapping[str, Any] = field(default_factory=lambda: DECODER_DEFAULTS)
    refused: tuple[Refused, ...] = ()
    parts: frozenset[str] = frozenset()
    not_quantized: str = ""
    weights_read: tuple[str, ...] = ()
    weights_reason: str = ""
    not_pruned: str = ""
    other_names: Mapping[str, str] = field(default_factory=dict)
    per_layer_keys: tuple[str, ...] = ("layer_types", "mlp_layer_types", "no_rope_layers")
    partial_rotary: bool = False
    prefix: str = ""
    stacked: StackedExperts | None = None

    def read(self, config: Mapping[str, Any]) -> Architecture:
        """The architecture of a ``config.json``; UsageError for what cannot be represented."""
        config = self._filled(self.text(config))
        self.check_types(config)
        self.check(config)
        positions = self.rotary(config)
        if not positions.get("rotary_base", 1.0) > 0:
            refuse(f"rope_theta = {positions['rotary_base']:g}", "a number above 0 is needed")
        return Architecture(
            transformer=self.transformer(config),
            vocab_size=config["vocab_size"],
            max_position_embeddings=config.get("max_position_embeddings", 2048),
            share_embeddings_and_output_weights=bool(config["tie_word_embeddings"]),
            huggingface_architecture=self.architecture,
            **positions,
        )

    def text(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The text model's keys, as a text model alone has them."""
        if not self.prefix:
            return dict(config)
        found = config.get("text_config")
        if not isinstance(found, Mapping):
            refuse(f"text_config = {found!r}", "the text model's values are needed")
        if config.get("tie_word_embeddings") or found.get("tie_word_embeddings"):
            refuse("tie_word_embeddings = True", "an output layer that is the embedding")
        return dict(found)

    def _filled(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """``config`` without its nulls, and with the family's defaults."""
        for key, default in self.defaults.items():
            if default is True and config.get(key, default) is None:
                refuse(f"{key} = null", "it is true where it is absent, and null counts as false")
        derived = {key for key in _DERIVED if config.get(key, 0) is None}
        defaults = {k: v for k, v in self.defaults.items() if k not in derived}
        return {**defaults, **{k: v for k, v in config.items() if v is not None}}

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise UsageError for what cannot be represented; the defaults are filled in."""
        for key, only, meaning in (*self.refused, _CAUSAL):
            if config.get(key, only) != only:
                refuse(f"{key} = {config[key]!r}", f"{meaning}; only {only!r} can be represented")
        self.check_windows(config)

    def check_types(self, config: Mapping[str, Any]) -> None:
        """Raise UsageError for a value of another type than the key has, and for no size."""
        for key, default in self.defaults.items():
            value = config.get(key, default)
            number = type(default) is float and type(value) is int
            if type(value) is not type(default) and not number:
                refuse(f"{key} = {value!r}", f"it has to be like {default!r}")
            if type(default) is float and not value > 0:  # megatron-core takes 0 for none
                refuse(f"{key} = {value!r}", "a number above 0 is needed")
        counts = {self.keys[name]: name in _NEEDED for name in _COUNTS if name in self.keys}
        for key, is_needed in {**counts, "vocab_size": True}.items():
            value = config.get(key)
            if (is_needed or key in config) and (type(value) is not int or value < 1):
                refuse(f"{key} = {value!r}", "a whole number from 1 on is needed")
        heads, groups = (config.get(self.keys.get(name, "")) for name in _COUNTS[3:5])
        if heads and groups and heads % groups:
            refuse(f"{heads} attention heads", f"{groups} heads of keys do not divide them")

    def check_windows(self, config: Mapping[str, Any]) -> None:
        """Raise UsageError if a layer attends within a window; one that no layer uses is fine."""
        others = set(config.get("layer_types", [])) - {"full_attention", "sliding_attention"}
        if others:
            refuse(f"layer_types with {', '.join(sorted(others))}", "only full attention is known")
        sliding = "sliding_attention" in config.get("layer_types", [])
        if config.get("use_sliding_window") and "layer_types" not in config:
            sliding = config.get("max_window_layers", 0) < config.get("num_hidden_layers", 0)
        if sliding:
            refuse(
                f"sliding window of {config.get('sliding_window')} tokens",
                "this family's layers all attend to the whole text here",
                "set use_sliding_window to false if texts stay below the window",
            )

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of TransformerConfig; ``config`` has passed :meth:`check`."""
        copied = {name: config[key] for name, key in self.keys.items() if key in config}
        return {**self.constants, **copied}

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Architecture's values for the positions; UsageError for a scaling not computed."""
        return positions.read(
            config,
            partial_rotary=self.partial_rotary,
            interleaved=bool(self.constants.get("rotary_interleaved")),
        )

    def with_shape(
        self,
        config: Mapping[str, Any],
        values: Mapping[str, Any],
        kept_layers: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """The way back: ``config`` with other sizes, those of a pruned model.

        ``config`` is the one before pruning, or already adapted; ``values`` has all fields of
        TransformerConfig; ``kept_layers`` are numbers from 1, by default the first ones.
        """
        # The head size that a file without the key means.
        head_size = values["hidden_size"] // values["num_attention_heads"]
        before = {"head_dim": head_size, **self._filled(config)}
        changed = dict(config)
        for name, key in self.keys.items():
            now = values.get(name)
            if now is not None and before.get(key) not in (None, now):
                changed[key] = now
        layers = config.get(self.keys["num_layers"])
        if layers is not None and layers != values["num_layers"]:
            kept = kept_layers or range(1, values["num_layers"] + 1)
            for key in self.per_layer_keys:
                if isinstance(config.get(key), list) and len(config[key]) == layers:
                    changed[key] = [config[key][number - 1] for number in kept]
        return changed

    def weight_mapping(self) -> WeightMapping | None:
        """ModelOpt's rules for the weights, where ModelOpt itself has none for the architecture.

        Called once torch is loaded: an override imports ModelOpt's mapping classes inside.
        """
        return None

    def is_carried(self, config: Mapping[str, Any], name: str) -> bool:
        """Whether a tensor of the files belongs to no layer of the Megatron model.

        Such tensors travel with a checkpoint as they are, and are exported unquantized.
        """
        return bool(self.prefix) and not name.startswith(self.prefix)

    def stored_name(self, name: str) -> str:
        """A tensor's name in the files, where ModelOpt's rules cannot say it."""
        return name

    def joined(self, values: Mapping[str, Any]) -> Mapping[str, Mapping[str, int]]:
        """Linear layers of the files that hold several of ModelOpt's rules, and each part's rows.

        ``{"gate_up_proj": {"gate_proj": 8192, "up_proj": 8192}}``, the parts in the order of the
        rows; ``values`` has all fields of TransformerConfig.
        """
        return {}

    def divided(self, values: Mapping[str, Any]) -> Mapping[str, Mapping[str, Sequence[int]]]:
        """Linear layers of ModelOpt's rules whose rows the files hold in others, or reordered:
        ``{"in_proj": {"in_proj_qkv": range(6144), "in_proj_z": range(6144, 8192)}}``."""
        return {}

    def tiny_config(self, **changes: Any) -> dict[str, Any]:
        """The tests' tiny model as ``transformers.AutoConfig.for_model`` takes it."""
        own = {"architectures": [self.architecture]}
        if self.prefix:
            text = {**TINY_SIZES, **self.tiny["text_config"], **changes}
            return {**self.tiny, **own, "text_config": text}
        return {**TINY_SIZES, **self.tiny, **own, **changes}


def is_further_layer(config: Mapping[str, Any], name: str) -> bool:
    """Whether a tensor belongs to a layer after the last, which predicts further tokens."""
    parts = name.split(".")
    is_layer = parts[:2] == ["model", "layers"] and parts[2].isdecimal()
    return is_layer and int(parts[2]) >= config["num_hidden_layers"]
