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

__all__ = ["DotProductAttention"]

# Masks are built for so many queries at a time, so that they grow with the keys only.
QUERY_CHUNK = 1024


class DotProductAttention(TransformerEngineBaseModule):
    """Attention over [s, b, h, d], [b, s, h, d] or packed [t, h, d] queries, keys and values.

    Causal attention without a window allocates no mask and uses PyTorch's fused kernels. Numbers
    of heads are taken from the tensors, so that pruned models work; ``num_attention_heads`` and
    ``num_gqa_groups`` are attributes that pruning reads and slices.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int | tuple[int, int],
        num_gqa_groups: int | None = None,
        attention_dropout: float = 0.0,
        qkv_format: str = "sbhd",
        attn_mask_type: str = "causal",
        window_size: tuple[int, int] | None = None,
        sequence_parallel: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        tp_group: Any = None,
        layer_number: int | None = None,
        attention_type: str = "self",
        cp_group: Any = None,
        cp_global_ranks: list[int] | None = None,
        cp_stream: Any = None,
        cp_comm_type: str = "p2p",
        softmax_scale: float | None = None,
        softmax_type: str = "vanilla",
        return_max_logit: bool = False,
    ) -> None:
        """Arguments as in Transformer Engine; sizes are those of the whole model, not of one rank.

        Raises:
            NotImplementedError: for ``return_max_logit``.
            ValueError: for an unknown ``softmax_type``.
        """
        super().__init__()
        if return_max_logit:
            raise NotImplementedError("attention of the stand-in returns no maximum logits")
        if softmax_type not in ("vanilla", "off-by-one", "learnable"):
            raise ValueError(f"softmax_type {softmax_type!r}: vanilla, off-by-one or learnable")
        key_channels = kv_channels if isinstance(kv_channels, int) else kv_channels[0]
        self.num_attention_heads = num_attention_heads
        self.num_gqa_groups = num_gqa_groups or num_attention_heads
        self.num_gqa_groups_per_partition = self.num_gqa_groups // tp_size
        self.attention_dropout = attention_dropout
        self.qkv_format = qkv_format
        self.attn_mask_type = attn_mask_type
        self.window_size = window_size
        self.sequence_parallel = sequence_parallel
        self.tp_size = tp_size
        self.tp_group = tp_group
        self.layer_number = layer_number
        self.attention_type = attention_type
        self.cp_comm_type = cp_comm_type
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(key_channels)
        self.softmax_type = softmax_type
        self.set_context_parallel_group(cp_group, cp_global_ranks, cp_stream, cp_comm_type)
        self._dropout_context: Callable[[], Any] = contextlib.nullcontext
        if get_rng_state_tracker is not None:
            self._dropout_context = lambda: get_rng_state_tracker().fork()
        self.softmax_offset: torch.Tensor | None = None
        heads = num_attention_heads // tp_size
        if softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(
                torch.zeros(heads, dtype=torch.float32, device=_device_of_new_parameters())
            )

    def set_context_parallel_group(
        self, cp_group: Any, cp_global_ranks: Any, cp_stream: Any, cp_comm_type: str = "p2p"
    ) -> None:
        """Set the ranks that share a sequence.

        Raises:
            NotImplementedError: for more than one rank.
        """
        groups = cp_group if isinstance(cp_group, (list, tuple)) else [cp_group]
        if any(group is not None and group.size() > 1 for group in groups):
            raise NotImplementedError(
                "attention of the stand-in for Transformer Engine has no context parallelism: "
                "set context_parallel_size=1 or install transformer_engine"
            )
        self.cp_group = cp_group

    def forward(
        self,
        query_layer: torch.Tensor,
        key_layer: torch.Tensor,
        value_layer: torch.Tensor,
        attention_mask: torch.Tensor | tuple[torch.Tensor, ...] | None = None,
        qkv_format: str | None = None,
        cu_seqlens_q: torch.Tensor | None = None,
        cu_seqlens_kv: torch.Tensor | None = None,
        cu_seqlens_q_padded: torch.Tensor | None = None,
        cu_seqlens_kv_padded: torch.Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str | None = None,
        window_size: tuple[int, int] | None = None,
        checkpoint_core_attention: bool = False,
        core_attention_bias_type: str = "no_bias",
        core_attention_bias: torch.Tensor | None = None,
        **ignored: Any,
    ) -> torch.Tensor:
        """Attention with heads and channels of the result joined.

        Args:
            query_layer: [sq, b, h, d], [b, sq, h, d] or [tq, h, d] by ``qkv_format``.
            key_layer, value_layer: the same with g heads, h a multiple of g.
            attention_mask: True where hidden, see :mod:`.masks`.
            core_attention_bias: added to the scaled scores, broadcastable to [b, h, sq, skv].

        Returns:
            [sq, b, h * dv], [b, sq, h * dv] or [tq, h * dv]. Queries that see no key get zeros.
        """
        layout = qkv_format or self.qkv_format
        mask_type = (attn_mask_type or self.attn_mask_type).replace(",", "_")
        if mask_type == "causal_padding":
            mask_type = "padding_causal"
        visibility = Visibility.of(mask_type, window_size or self.window_size)
        if core_attention_bias_type not in ("no_bias", "post_scale_bias"):
            raise NotImplementedError(f"core_attention_bias_type {core_attention_bias_type!r}")
        if torch.is_grad_enabled():
            key_layer, value_layer = _unshared(key_layer), _unshared(value_layer)
        if layout == "thd":
            if cu_seqlens_q is None or cu_seqlens_kv is None:
                raise ValueError("format thd needs cu_seqlens_q and cu_seqlens_kv")
            return self._packed(
                (query_layer, key_layer, value_layer),
                visibility,
                (cu_seqlens_q, cu_seqlens_kv),
                (cu_seqlens_q_padded, cu_seqlens_kv_padded),
            )
        order = (1, 2, 0, 3) if layout == "sbhd" else (0, 2, 1, 3)
        query, key, value = (each.permute(order) for each in (query_layer, key_layer, value_layer))
        result = self._attend(
            query,
            key,
            value,
            visibility,
            visible_keys(mask_type, attention_mask),
            core_attention_bias,
        )
        result = result.permute((2, 0, 1, 3) if layout == "sbhd" else (0, 2, 1, 3))
        return result.flatten(-2)

    def _packed(
        self,
        layers: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        visibility: Visibility,
        ends: tuple[torch.Tensor, torch.Tensor],
        padded_ends: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> torch.Tensor:
        """Sequences of [t, h, d] one by one; what lies between padded sequences becomes zero."""
        query, key, value = layers
        spans = []
        for end, padded in zip(ends, padded_ends, strict=True):
            starts = (end if padded is None else padded)[:-1].tolist()
            spans.append(list(zip(starts, end.diff().tolist(), strict=True)))
        pieces, written = [], 0
        for (q_start, q_length), (k_start, k_length) in zip(*spans, strict=True):
            part = self._attend(
                query[None, q_start : q_start + q_length].transpose(1, 2),
                key[None, k_start : k_start + k_length].transpose(1, 2),
                value[None, k_start : k_start + k_length].transpose(1, 2),
                visibility,
            )
            pieces.append(part.new_zeros(q_start - written, part.shape[1], part.shape[3]))
            pieces.append(part[0].transpose(0, 1))
            written = q_start + q_length
        rest = query.new_zeros(query.shape[0] - written, query.shape[1], value.shape[2])
        return torch.cat([*pieces, rest]).flatten(-2)

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visibility: Visibility,
        visible: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[b, h, sq, d], [b, g, skv, d], [b, g, skv, dv] to [b, h, sq, dv]."""
        queries, keys = query.shape[2], key.shape[2]
        dropout = self.attention_dropout if self.training else 0.0
        context = self._dropout_context if dropout else contextlib.nullcontext
        everything = visibility.is_everything(queries, keys)
        plain = visible is None and bias is None and self.softmax_type == "vanilla"
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
            added = bias
            if bias is not None and bias.shape[-2] > 1:
                added = bias[..., start:stop, :]
            with context():
                parts.append(
                    self._masked(query[:, :, start:stop], key, value, mask, added, dropout)
                )
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def _masked(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        visible: torch.Tensor | None,
        bias: torch.Tensor | None,
        dropout: float,
    ) -> torch.Tensor:
        """Attention of some queries with an explicit mask, bias or softmax offset."""
        nothing = None
        if visible is not None:
            # Rows without a visible key would be 0 / 0: see all keys, then give zeros.
            nothing = ~visible.any(dim=-1, keepdim=True)
            visible = visible | nothing
        mask: torch.Tensor | None = visible
        if bias is not None:
            mask = bias.to(query.dtype)
            if visible is not None:
                mask = mask.masked_fill(~visible, float("-inf"))
        if self.softmax_type != "vanilla":
            key, value, mask = self._with_sink(query, key, value, mask)
        result = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=self.softmax_scale
        )
        return result if nothing is None else result.masked_fill(nothing, 0.0)

    def _with_sink(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Append a key of score ``softmax_offset`` (0 for off-by-one) and value zero."""
        batch, heads, queries, _ = query.shape
        scores = query.new_zeros(batch, heads, queries, key.shape[2])
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, float("-inf"))
        elif mask is not None:
            scores = scores + mask
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
    """A copy if ``tensor`` lies in a buffer that is written to in place, such as a cache of keys.

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
