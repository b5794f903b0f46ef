"""Other rotary frequencies for the layers that attend within a window, as in OLMo 3 and Gemma 3.

megatron-core gives one table to all layers. Hooks compute the second one wherever it computes the
first, and hand it to those layers.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer.utils import is_layer_window_attention


class LocalRotations:
    """Unscaled rotations of a base, as long as those that the model's own embedding gave last."""

    def __init__(self, model: Any, base: float) -> None:
        config = model.config
        self._embedding = RotaryEmbedding(
            config.kv_channels,
            rotary_percent=1.0,
            rotary_interleaved=config.rotary_interleaved,
            rotary_base=base,
            use_cpu_initialization=config.use_cpu_initialization,
            cp_group=model.rotary_pos_emb.cp_group,
        )
        self._table: torch.Tensor | None = None

    def compute(self, _embedding: Any, inputs: Any, named: dict[str, Any], _output: Any) -> None:
        """A forward hook of the model's embedding."""
        self._table = self._embedding(*inputs, **named)

    def replace(self, _attention: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, Any]:
        """A forward pre-hook of a layer's attention."""
        return inputs, {**named, "rotary_pos_emb": self._table}


def attach(model: Any, base: float) -> None:
    """Rotate the layers of ``model`` within a window by ``base``, without any scaling."""
    local, config = LocalRotations(model, base), model.config
    model.rotary_pos_emb.register_forward_hook(local.compute, with_kwargs=True)
    for layer in model.decoder.layers:
        skipped = config.window_attn_skip_freq
        if is_layer_window_attention(config.window_size, skipped, layer.layer_number):
            attention = layer.self_attention
            attention.register_forward_pre_hook(local.replace, with_kwargs=True)
            # YaRN multiplies queries and keys of all layers by a factor.
            attention._yarn_concentration_factor = 1.0
