"""Attention."""

from transformer_engine.pytorch.attention import rope
from transformer_engine.pytorch.attention.dot_product_attention import DotProductAttention
from transformer_engine.pytorch.attention.rope import apply_rotary_pos_emb
from transformer_engine.pytorch.attention.split import _SplitAlongDim

__all__ = ["DotProductAttention", "_SplitAlongDim", "apply_rotary_pos_emb", "rope"]
