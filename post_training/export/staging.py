"""Tensors between a GPU and memory that the operating system may move.

The driver copies such memory through a buffer of its own with one core, which also meets every new
page: 9.4 GB took 5.6 s on an H100, far below what the bus carries. Here a locked buffer takes the
bus's part, and all cores copy between it and the memory.
"""

from __future__ import annotations

import functools

import torch

_BYTES = 1 << 28


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU, contiguous, that shares memory with nothing."""
    tensor = tensor.detach().contiguous()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    _copy(tensor, copy) if tensor.is_cuda else copy.copy_(tensor)
    return copy


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on the CPU, or a copy of it on the GPU."""
    if device.type != "cuda":
        return tensor.to(device)
    tensor = tensor.contiguous()
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    _copy(tensor, copy)
    return copy


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    pieces = (each.reshape(-1).view(torch.uint8).split(_BYTES) for each in (source, target))
    for taken, given in zip(*pieces, strict=True):
        buffer = _buffer()[: taken.numel()]
        buffer.copy_(taken)  # returns when it is done
        given.copy_(buffer)


@functools.cache
def _buffer() -> torch.Tensor:
    return torch.empty(_BYTES, dtype=torch.uint8, pin_memory=True)
