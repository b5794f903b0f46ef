"""megatron-core's multi-latent attention where queries have no latent."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention


class PlainQueryMLASelfAttention(MLASelfAttention):
    """Its queries come from one linear layer, without a norm of their own.

    megatron-core takes Transformer Engine's linear with a norm for them, which would normalize the
    layer's input a second time. The name has to contain that of the base class: ModelOpt's importer
    and exporter look for it.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        resolved: dict[str, Any] = super()._resolve_qk_norm_config(submodules)
        return {**resolved, "linear_q_proj": submodules.linear_q_proj}


def without_query_latent(block: Any) -> None:
    """Change the layer specs of ``block``, of ModelOpt's spec, for ``q_lora_rank`` None."""
    for layer in block.layer_specs:
        attention = layer.submodules.self_attention
        attention.module = PlainQueryMLASelfAttention
        attention.submodules.q_layernorm = IdentityOp
