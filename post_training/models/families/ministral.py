"""Ministral 3, and Mistral Small 3.1 and Ministral 3 with what sees images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from post_training.models.architecture import Architecture
from post_training.models.families import positions, vision
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    ONLY_SILU,
    WeightMapping,
    refuse,
)
from post_training.models.families.mistral import Mistral

_BETA, _ORIGINAL = "llama_4_scaling_beta", "original_max_position_embeddings"
# What transformers takes for a text model without rotary values.
_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    _ORIGINAL: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    _BETA: 0.1,
}


class Ministral3(Mistral):
    """Queries are multiplied by a factor that grows with their positions, after the rotation."""

    absent_window: ClassVar[int | None] = None

    def read(self, config: Mapping[str, Any]) -> Architecture:
        found = super().read(config)
        stated = self.text(config)
        if not self.tempers(stated):
            return found
        rope = positions.rope_scaling(_with_rope(stated))
        for key in (_BETA, _ORIGINAL):
            value = rope.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                refuse(f"rope_parameters: {key} = {value!r}", "queries are multiplied by it")
        temperature = {"floor_scale": rope[_ORIGINAL], "scale": float(rope[_BETA]), "from": 0}
        return dataclasses.replace(found, attention_temperature=temperature)

    def tempers(self, text: Mapping[str, Any]) -> bool:
        """Whether the text model is a Ministral 3."""
        return True

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if not self.tempers(config):
            return super().rotary(config)
        stated = _with_rope(config)
        rope = positions.rope_scaling(stated)
        scales = [rope.pop(name, None) for name in ("mscale", "mscale_all_dim")]
        other = {name: each for name, each in stated.items() if name != "rope_scaling"}
        found = super().rotary({**other, "rope_parameters": rope})
        if scales != [None, None] and (scales[0] != scales[1] or not scales[0]):
            refuse(f"rope scaling mscale = {scales[0]!r}", f"mscale_all_dim is {scales[1]!r}")
        if "yarn" in found and scales[0]:
            # Their ratio is the factor of sine and cosine.
            found["yarn"] |= {"mscale": 1.0, "mscale_all_dim": 1.0}
        return found


class Mistral3(Ministral3):
    """The text model is Mistral's or Ministral 3's, as ``model_type`` of ``text_config`` says."""

    def text(self, config: Mapping[str, Any]) -> dict[str, Any]:
        found = vision.text(config) if "text_config" in config else dict(config)
        if (kind := found.get("model_type", "mistral")) not in ("mistral", "ministral3"):
            refuse(f"text_config: model_type = {kind!r}", "known are 'mistral' and 'ministral3'")
        if kind == "mistral":
            # What transformers takes for a text model of that kind without the keys.
            absent = {"sliding_window": Mistral.absent_window, "rms_norm_eps": 1e-6}
            found = {**absent, "head_dim": None, **found}
        return found

    def tempers(self, text: Mapping[str, Any]) -> bool:
        return text.get("model_type") == "ministral3"

    def weight_mapping(self) -> WeightMapping:
        return vision.nested(super().weight_mapping(), self.prefix)


def _with_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    stated = config.get("rope_parameters") or config.get("rope_scaling")
    return dict(config) if stated else {**config, "rope_parameters": _ROPE}


_DEFAULTS = {
    **DECODER_DEFAULTS,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_TINY = {
    "head_dim": 16,
    "sliding_window": None,
    # Both the scaling and the factor of queries change within the tests' texts.
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        _ORIGINAL: 16,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        _BETA: 0.3,
    },
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = (
    Ministral3(
        name="ministral3",
        architecture="Ministral3ForCausalLM",
        defaults=_DEFAULTS,
        refused=(ONLY_SILU,),
        tiny={"model_type": "ministral3", **_TINY},
    ),
    Mistral3(
        name="mistral3-vision",
        architecture="Mistral3ForConditionalGeneration",
        not_pruned="what sees images gives embeddings of the text model's width, and is not cut",
        prefix="language_model.",
        defaults=_DEFAULTS,
        refused=(ONLY_SILU,),
        tiny={
            "model_type": "mistral3",
            "tie_word_embeddings": False,
            "text_config": {"model_type": "ministral3", **_TINY},
        },
    ),
)
