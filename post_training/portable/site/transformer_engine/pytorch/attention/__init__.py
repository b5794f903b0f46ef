"""Attention."""

from transformer_engine.pytorch.attention import rope
from transformer_engine.pytorch.attention.dot_product_attention import DotProductAttention

__all__ = ["DotProductAttention", "rope"]
