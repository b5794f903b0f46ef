"""This rank's part of a tensor of the files."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state

from post_training.common.safetensors_index import Entry


def _rank_of(parallel_config: Any) -> tuple[int, int]:
    """Rank and size of the group that a tensor is divided over."""
    if parallel_config.parallel_group == "ETP":
        return (
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )
    return (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_world_size(),
    )


def part_of(whole: torch.Tensor, parallel_config: Any) -> torch.Tensor:
    """This rank's part of a tensor; ValueError if it cannot be divided."""
    dimension = None if parallel_config is None else parallel_config.sharding_dim
    if dimension is None:
        return whole
    rank, size = _rank_of(parallel_config)
    if whole.shape[dimension] % size:
        raise ValueError(f"{list(whole.shape)} is not divided by {size} in dimension {dimension}")
    return whole.chunk(size, dim=dimension)[rank].contiguous()


def starts(found: torch.Tensor, whole: Entry, parallel_config: Any) -> tuple[int, ...]:
    """Where this rank's slice of a tensor starts in each dimension."""
    rank = 0 if parallel_config is None else _rank_of(parallel_config)[0]
    return tuple(
        0 if mine == size else rank * mine
        for mine, size in zip(found.shape, whole.shape, strict=True)
    )
