"""See :mod:`transformer_engine.pytorch.tensor`."""

from transformer_engine.pytorch.tensor import QuantizedTensor

__all__ = ["Float8Tensor"]


class Float8Tensor(QuantizedTensor):
    """A tensor stored in FP8 with one scale."""
