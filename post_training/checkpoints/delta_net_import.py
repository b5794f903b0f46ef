"""Weights of Qwen3-Next's layers that ModelOpt's importer does not read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core import parallel_state

# A tensor of the folder by name, whole or this rank's rows.
Read = Callable[[str], torch.Tensor]


@torch.no_grad()
def read(layer: Any, prefix: str, divided: Mapping[str, Any], get: Read) -> None:
    """Fill a gated delta net with this rank's share.

    Args:
        layer: the :class:`CachingGatedDeltaNet`.
        prefix: of its tensors in the files.
        divided: its linear layers, as ``Family.divided`` has them.
        get: a whole tensor of the files.
    """
    keys, values = layer.qk_dim, layer.v_dim
    heads = (layer.num_value_heads,)
    linears = {"in_proj": (keys, keys, values, values), "in_proj_ba": 2 * heads}
    for name, sizes in linears.items():
        parts = divided[name]
        stored = torch.cat([get(f"{prefix}{part}.weight") for part in parts])
        whole = torch.empty_like(stored)
        whole[[row for rows in parts.values() for row in rows]] = stored
        getattr(layer, name).weight.copy_(_mine(whole, sizes))
    kernels = _mine(get(f"{prefix}conv1d.weight"), (keys, keys, values))
    layer.conv1d.weight.copy_(kernels)
    layer.out_norm.weight.copy_(get(f"{prefix}norm.weight"))
    for name in ("A_log", "dt_bias"):
        getattr(layer, name).copy_(_mine(get(f"{prefix}{name}"), heads))
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    layer.out_proj.weight.copy_(get(f"{prefix}out_proj.weight").chunk(ranks, dim=1)[rank])


@torch.no_grad()
def read_gated_qkv(linear: Any, prefix: str, get: Read) -> None:
    """Fill the linear of an attention whose output is gated.

    ``q_proj`` has queries and gate of each head in turn; megatron-core has the queries of a group's
    heads, their gates, and the group's key and value.

    Args:
        get: this rank's rows of a tensor of the files.
    """
    size = linear.config.kv_channels
    query, key, value = (get(f"{prefix}{name}_proj.weight") for name in "qkv")
    groups = len(key) // size
    query = query.view(groups, -1, 2, size, query.shape[-1]).transpose(1, 2).flatten(1, 3)
    key, value = (each.unflatten(0, (groups, size)) for each in (key, value))
    linear.weight.copy_(torch.cat([query, key, value], dim=1).flatten(0, 1))


def _mine(whole: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    """This rank's rows of each part, whose parts have so many rows in all."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    return torch.cat([part.chunk(ranks)[rank] for part in whole.split(list(sizes))])
