"""The base class of quantized tensors. No tensor is ever an instance of it."""

from __future__ import annotations

import torch


class QuantizedTensor(torch.Tensor):
    """For ``isinstance`` tests; fp8_utils.py:46 and :374 import it without ``try``."""
