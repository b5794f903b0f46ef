"""The collectives of tensor-parallel linears, and two names that megatron-core imports."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.distributed as dist

from transformer_engine.common.recipe import NO_LOW_PRECISION

__all__ = [
    "CudaRNGStatesTracker",
    "activation_recompute_forward",
    "all_reduce",
    "gather_along_first_dim",
    "reduce_scatter_along_first_dim",
]


class CudaRNGStatesTracker:
    """Base class of a class that extensions/transformer_engine.py:3256 defines at its import.

    megatron-core makes one only for callers that ask tensor_parallel/random.py for Transformer
    Engine's tracker; this repository uses megatron-core's own.
    """


def activation_recompute_forward(*args: Any, **kwargs: Any) -> NoReturn:
    """Marks FP8 recomputation. tensor_parallel/random.py:86 catches no ImportError, only a missing
    module, and calls it (:696, :788) where FP8 computation is on."""
    raise NotImplementedError(NO_LOW_PRECISION)


def all_reduce(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Sum over the group, in place if the tensor is contiguous."""
    if group is None or group.size() == 1:
        return tensor
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor


def gather_along_first_dim(tensor: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Concatenate the ranks' tensors: [s / n, ...] to [s, ...]."""
    if group is None or group.size() == 1:
        return tensor
    gathered = tensor.new_empty((tensor.shape[0] * group.size(), *tensor.shape[1:]))
    dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=group)
    return gathered


def reduce_scatter_along_first_dim(
    tensor: torch.Tensor, group: dist.ProcessGroup | None
) -> torch.Tensor:
    """Sum over the group and keep this rank's part: [s, ...] to [s / n, ...]."""
    if group is None or group.size() == 1:
        return tensor
    part = tensor.new_empty((tensor.shape[0] // group.size(), *tensor.shape[1:]))
    dist.reduce_scatter_tensor(part, tensor.contiguous(), group=group)
    return part
