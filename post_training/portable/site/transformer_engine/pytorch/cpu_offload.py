"""Offloading of activations to the host: not available."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["get_cpu_offload_context"]


def get_cpu_offload_context(
    enabled: bool = False, *args: Any, **kwargs: Any
) -> tuple[AbstractContextManager[None], Callable[[torch.Tensor], torch.Tensor]]:
    """(context for the forward pass, function applied to a layer's output); both do nothing.

    Raises:
        NotImplementedError: if ``enabled``.
    """
    if enabled:
        raise NotImplementedError(
            "the pure-PyTorch stand-in for Transformer Engine has no CPU offloading"
        )
    return contextlib.nullcontext(), lambda tensor: tensor
