"""Quantized tensor classes. No tensor is ever an instance: callers test with ``isinstance``."""

from __future__ import annotations

import torch

__all__ = ["QuantizedTensor"]


class QuantizedTensor(torch.Tensor):
    """Base class of tensors stored in low precision."""
