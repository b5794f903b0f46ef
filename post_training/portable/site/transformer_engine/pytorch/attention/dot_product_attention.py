"""Scaled dot-product attention on ``torch.nn.functional.scaled_dot_product_attention``."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from transformer_engine.pytorch.attention.masks import Visibility, visible_keys
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

# Masks are built for so many queries at a time, so that they grow with the keys only.
QUERY_CHUNK = 1024


class DotProductAttention(TransformerEngineBaseModule):
    """Attention over [s, b, h, d] queries, keys and values, the base of megatron-core's
    TEDotProductAttention (extensions/transformer_engine.py:1770).

    Causal attention without a window allocates no mask and uses PyTorch's fused kernels. Numbers
    of heads are taken from the tensors, so that pruned models work; ``num_attention_heads`` is an
    attribute that ModelOpt's pruning replaces (nas/plugins/megatron.py:627).
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        attention_dropout: float = 0.0,
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        cp_group: Any = None,
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        **ignored: Any,
    ) -> None:
        """Arguments as in Transformer Engine; sizes are those of the whole model, not of one rank.

        ``softmax_type`` is "vanilla", "off-by-one" or "learnable" (gpt-oss: one offset a head).

        Raises:
            NotImplementedError: for context parallelism.
        """
        super().__init__()
        # extensions/transformer_engine.py:1864 passes a group only for more than one rank.
        if cp_group is not None:
            raise NotImplementedError(
                "attention of the stand-in for Transformer Engine has no context parallelism: "
                "set context_parallel_size=1 or install transformer_engine"
            )
        key_channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.num_attention_heads = num_attention_heads
        self.attention_dropout = attention_dropout
        self.attn_mask_type = attn_mask_type
        self.window_size = window_size
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(key_channels)
        self.softmax_type = softmax_type
        self._dropout_context: Callable[[], Any] = contextlib.nullcontext
        if get_rng_state_tracker is not None:
            self._dropout_context = lambda: get_rng_state_tracker().fork()
        self.softmax_offset: torch.Tensor | None = None
        if softmax_type == "learnable":
            heads = num_attention_heads // tp_size
            self.softmax_offset = torch.nn.Parameter(
                torch.zeros(heads, dtype=torch.float32, device=_device_of_new_parameters())
            )

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        attn_mask_type: str | None = None,
        **unavailable: Any,
    ) -> torch.Tensor:
        """Attention with heads and channels of the result joined.

        Args:
            query_layer: [sq, b, h, d].
            key_layer, value_layer: the same with g heads, h a multiple of g.
            attention_mask: True where hidden, see :mod:`.masks`.

        Returns:
            [sq, b, h * dv]. Queries that see no key get zeros.

        Raises:
            NotImplementedError: for packed sequences and for a bias on the scores (T5).
        """
        if unavailable:
            raise NotImplementedError(
                f"attention of the stand-in for Transformer Engine has no {', '.join(unavailable)}"
            )
        mask_type = attn_mask_type or self.attn_mask_type
        if torch.is_grad_enabled():
            key_layer, value_layer = _unshared(key_layer), _unshared(value_layer)
        query, key, value = (
            each.permute(1, 2, 0, 3) for each in (query_layer, key_layer, value_layer)
        )
        result = self._attend(
            query,
            key,
            value,
            Visibility.of(mask_type, self.window_size),
            visible_keys(mask_type, attention_mask),
        )
        return result.permute(2, 0, 1, 3).flatten(-2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visibility: Visibility,
        visible: torch.Tensor | None,
    ) -> torch.Tensor:
        """[b, h, sq, d], [b, g, skv, d], [b, g, skv, dv] to [b, h, sq, dv]."""
        queries, keys = query.shape[2], key.shape[2]
        dropout = self.attention_dropout if self.training else 0.0
        context = self._dropout_context if dropout else contextlib.nullcontext
        everything = visibility.is_everything(queries, keys)
        plain = visible is None and self.softmax_type == "vanilla"
        if plain and (everything or visibility.is_plain_causal(queries, keys)):
            grouped = query.shape[1] != key.shape[1]
            # Memory-efficient kernels take no groups; flash kernels take groups in half precision.
            if grouped and not (query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)):
                key, value = _repeat_heads(key, query), _repeat_heads(value, query)
                grouped = False
            with context():
                return F.scaled_dot_product_attention(
                    query,
                    key,
                    value,
                    dropout_p=dropout,
                    is_causal=not everything,
                    scale=self.softmax_scale,
                    enable_gqa=grouped,
                )
        key, value = _repeat_heads(key, query), _repeat_heads(value, query)
        parts = []
        for start in range(0, queries, QUERY_CHUNK):
            stop = min(start + QUERY_CHUNK, queries)
            mask = visibility.rows(start, stop, queries, keys, query.device)
            if visible is not None:
                given = visible[..., start:stop, :] if visible.shape[-2] > 1 else visible
                mask = given if mask is None else mask & given
            with context():
                parts.append(self._masked(query[:, :, start:stop], key, value, mask, dropout))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _masked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attention of some queries with an explicit mask or a softmax offset."""
        nothing = None
        if visible is not None:
            # Rows without a visible key would be 0 / 0: see all keys, then give zeros.
            nothing = ~visible.any(dim=-1, keepdim=True)
            visible = visible | nothing
        mask = visible
        if self.softmax_type != "vanilla":
            key, value, mask = self._with_sink(query, key, value, visible)
        result = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=self.softmax_scale
        )
        return result if nothing is None else result.masked_fill(nothing, 0.0)

    def _with_sink(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append a key of score ``softmax_offset`` (0 for off-by-one) and value zero."""
        batch, heads, queries, _ = query.shape
        scores = query.new_zeros(batch, heads, queries, key.shape[2])
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        offset = query.new_zeros(heads)
        if self.softmax_offset is not None:
            offset = self.softmax_offset.to(query.dtype)
        column = offset.view(1, heads, 1, 1).expand(batch, heads, queries, 1)
        return (
            torch.cat([key, key.new_zeros(batch, heads, 1, key.shape[3])], dim=2),
            torch.cat([value, value.new_zeros(batch, heads, 1, value.shape[3])], dim=2),
            torch.cat([scores, column], dim=-1),
        )


def _repeat_heads(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """[b, g, s, d] to [b, h, s, d]: each head as often as queries share it."""
    repeats = query.shape[1] // tensor.shape[1]
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)


def _unshared(tensor: torch.Tensor) -> torch.Tensor:
    """A copy if ``tensor`` lies in a buffer that is written to in place, such as a KV cache.

    The next write to the cache would otherwise change what the backward pass needs.
    """
    if tensor.is_inference() or tensor._base is None or tensor._version == 0:
        return tensor
    return tensor.clone()


def _device_of_new_parameters() -> torch.device:
    default = torch.get_default_device()
    if default.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return default
