"""OLMo 2 and OLMo 3: norms after attention and MLP alone, queries and keys normed as a whole."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from post_training.models.architecture import Architecture
from post_training.models.families import positions, windows
from post_training.models.families.base import (
    DECODER_DEFAULTS,
    NO_ATTENTION_BIAS,
    ONLY_SILU,
    RMSNORM_SWIGLU,
    Family,
    WeightMapping,
    refuse,
)

_THETA = 500000.0  # OLMo 3's, where a file states none


class Olmo2(Family):
    """Llama without norms before attention and MLP, but with norms after them."""

    def read(self, config: Mapping[str, Any]) -> Architecture:
        found = super().read(config)
        return dataclasses.replace(
            found, pre_norms=False, post_norms=True, full_width_qk_norms=True
        )

    def weight_mapping(self) -> WeightMapping:
        from modelopt.torch.export.plugins.mcore_custom import COL_TP, REPLICATE, NameRemapping
        from modelopt.torch.export.plugins.mcore_llama import (
            llama_causal_lm_export,
            llama_causal_lm_import,
        )

        layer = "model.layers.{}."
        names = {
            "post_self_attn_layernorm": (f"{layer}post_attention_layernorm.", REPLICATE),
            "post_mlp_layernorm": (f"{layer}post_feedforward_layernorm.", REPLICATE),
            "q_layernorm": (f"{layer}self_attn.q_norm.", COL_TP),
            "k_layernorm": (f"{layer}self_attn.k_norm.", COL_TP),
        }
        return WeightMapping(
            {**llama_causal_lm_import, **{n: NameRemapping(*each) for n, each in names.items()}},
            {**llama_causal_lm_export, **{n: NameRemapping(e) for n, (e, _) in names.items()}},
        )


class Olmo3(Olmo2):
    """Three layers of four attend within a window; only the others' rotation may be scaled."""

    def check_windows(self, config: Mapping[str, Any]) -> None:
        """Raise UsageError for other kinds of layers than the two, or a window without a size."""
        windows.check(config, self._windows(config))

    def transformer(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return super().transformer(config) | windows.fields(config, self._windows(config))

    def rotary(self, config: Mapping[str, Any]) -> dict[str, Any]:
        if config.get("rope_theta", _THETA) != _THETA:
            refuse(
                f"rope_theta = {config['rope_theta']!r} beside rope_scaling",
                f"transformers takes {_THETA:g} for the layers within a window, vLLM this one",
                "state rope_parameters for each kind of layer",
            )
        full, local = positions.of_each_kind(config, _THETA, _THETA)
        found = super().rotary(full)
        if found != {**super().rotary({}), "rotary_base": local}:
            found["local_rotary_base"] = local
        return found

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

    def _windows(self, config: Mapping[str, Any]) -> list[int]:
        return windows.read(config, windows.every(4, config["num_hidden_layers"]))


_SHARED: dict[str, Any] = {
    "constants": RMSNORM_SWIGLU,
    "refused": (ONLY_SILU, NO_ATTENTION_BIAS),
    "not_pruned": "ModelOpt does not cut the norms after attention and MLP, nor those of all heads",
}
FAMILIES = (
    Olmo2(
        name="olmo2",
        architecture="Olmo2ForCausalLM",
        defaults={**DECODER_DEFAULTS, "rms_norm_eps": 1e-5},
        tiny={"model_type": "olmo2", "tie_word_embeddings": False},
        **_SHARED,
    ),
    Olmo3(
        name="olmo3",
        architecture="Olmo3ForCausalLM",
        defaults={**DECODER_DEFAULTS, "rms_norm_eps": 1e-5, "sliding_window": 4096},
        tiny={
            "model_type": "olmo3",
            # Shorter than the tests' texts, and than what is generated after them.
            "sliding_window": 16,
            "rope_parameters": {
                windows.SLIDING: {"rope_type": "default", "rope_theta": 500000.0},
                windows.FULL: {
                    "rope_type": "yarn",
                    "rope_theta": 500000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "attention_factor": 1.138629436111989,
                    "beta_fast": 32.0,
                    "beta_slow": 1.0,
                },
            },
            "tie_word_embeddings": False,
        },
        **_SHARED,
    ),
)
