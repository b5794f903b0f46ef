"""RMSNorm of queries and keys over all heads at once, as in OLMo 2 and MiniMax-M2.

megatron-core's norms see one head. These are put into the built layers; at TP > 1 each rank has the
weights of its heads, and the mean square is that of all ranks' heads. ``qk_layernorm`` stays off in
the configuration: with it megatron-core adds up the gradients of all ranks' weights, as of weights
that every head shares (distributed/finalize_model_grads.py).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint


class FullWidthNorm(torch.nn.Module):
    """Normalizes [sequence, batch, this rank's heads, size of a head] over all ranks' heads.

    Args:
        config: megatron-core's.
        heads: of this rank.
        size: of a head.
        group: of tensor-parallel ranks.
    """

    def __init__(self, config: Any, heads: int, size: int, group: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(heads * size, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, True, 0, 1)
        self.eps, self.group = config.layernorm_epsilon, group

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """In float32, rounded once at the end."""
        flat = inputs.flatten(-2).float()
        squares = flat.square().sum(-1, keepdim=True)
        if (ranks := self.group.size()) > 1:
            # The sum's gradient is that of all ranks' outputs.
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        scale = torch.rsqrt(squares / (ranks * flat.shape[-1]) + self.eps)
        return (self.weight.float() * (flat * scale)).to(inputs.dtype).view_as(inputs)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Its weight, which is divided over tensor-parallel ranks."""
        found: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self.group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        return found


def attach(model: Any) -> None:
    """Put the norms into the layers of ``model``, this rank's part, their weights uninitialized."""
    for layer in model.decoder.layers:
        attention = layer.self_attention
        size = attention.hidden_size_per_attention_head
        counts = {
            "q_layernorm": attention.num_attention_heads_per_partition,
            "k_layernorm": attention.num_query_groups_per_partition,
        }
        for name, heads in counts.items():
            group = attention.pg_collection.tp
            setattr(attention, name, FullWidthNorm(model.config, heads, size, group))
