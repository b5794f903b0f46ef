"""Phi-3 and Phi-4: Llama with query, key and value in one matrix, gate and up in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from post_training.models.families import positions
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    NO_ATTENTION_BIAS,
    ONLY_SILU,
    refuse,
)
from post_training.models.families.mistral import Mistral

_ORIGINAL = "original_max_position_embeddings"
_LONG = ("longrope", "su")  # the same, by its name of later and of the first files


class Phi3(Mistral):
    """Windows as Mistral's; ``partial_rotary_factor`` may leave a part of each head unrotated."""

    absent_window: ClassVar[int | None] = None

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        scaling = positions.rope_scaling(config)
        if scaling.get("rope_type", scaling.get("type")) in _LONG:
            return self._long(config, scaling)
        values = super().rotary(config)
        if values.keys() - {"rotary_base", "rotary_percent"}:
            kind = scaling.get("rope_type", scaling.get("type"))
            refuse(f"rope type {kind!r}", "transformers' model of this family knows longrope alone")
        return values

    def _long(self, config: Mapping[str, Any], scaling: Mapping[str, Any]) -> dict[str, Any]:
        """The scaling of models for long texts; the length of the file is that of the scaling."""
        names = {"rope_scaling", "rope_parameters", _ORIGINAL}
        plain = {name: each for name, each in config.items() if name not in names}
        kept = {n: scaling[n] for n in ("rope_theta", "partial_rotary_factor") if n in scaling}
        values = super().rotary({**plain, **kept})
        original = config.get(_ORIGINAL, 4096)
        if scaling.get(_ORIGINAL, original) != original:
            refuse(f"{_ORIGINAL} = {original!r}", f"it is {scaling[_ORIGINAL]!r} in the scaling")
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        pairs = int(config.get("head_dim", hidden // heads) * values["rotary_percent"]) // 2
        length = {"max_position_embeddings": config.get("max_position_embeddings", 4096)}
        stated = {**scaling, **length, _ORIGINAL: original}
        return values | positions.longrope(stated, pairs)

    def joined(self, values: Mapping[str, Any]) -> Mapping[str, Mapping[str, int]]:
        heads, groups = values["num_attention_heads"], values["num_query_groups"]
        size, ffn = values["kv_channels"], values["ffn_hidden_size"]
        return {
            "qkv_proj": {"q_proj": heads * size, "k_proj": groups * size, "v_proj": groups * size},
            "gate_up_proj": {"gate_proj": ffn, "up_proj": ffn},
        }


FAMILIES = (
    Phi3(
        name="phi3",
        architecture="Phi3ForCausalLM",
        defaults={**DECODER_DEFAULTS, "rms_norm_eps": 1e-5},
        refused=(ONLY_SILU, NO_ATTENTION_BIAS),
        partial_rotary=True,
        tiny={
            "model_type": "phi3",
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.75,
            },
            "pad_token_id": 0,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "tie_word_embeddings": False,
        },
    ),
)
