"""Attention of a draft over the steps of training-time test, in memory linear in the length.

At step ``k`` the draft reads what it made at step ``k - 1``, as it will when it is used. A query of
row ``i`` then sees (Li et al. 2025, arXiv:2503.01840, figure 7; the drawing in ModelOpt's
``set_multi_step_attention_mask`` is the same)

- keys of step 0 (from the target's states) of rows ``0 .. i - k``,
- of each later step ``m`` up to ``k`` the one key of row ``i - k + m``.

Each row thus adds ``k`` scores to an ordinary causal row: a [s, (k + 1) s] mask, which grows with
the square of the length, never exists. :mod:`post_training.drafts.eagle3.flash_attention` computes
it where PyTorch has a flash kernel. Elsewhere (float32 on a GPU) queries go in chunks that are
computed again in the backward pass, so that of their scores only one chunk's are held at a time.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from post_training.drafts.eagle3 import flash_attention

# Elements of one chunk's scores, and the least number of queries in it.
CHUNK_ELEMENTS = 1 << 27
SMALLEST_CHUNK = 128


class StepAttention:
    """Keys and values of all steps so far of one layer.

    Args:
        independent: every step is plain causal attention (``--mix-hidden-states``).
    """

    def __init__(self, independent: bool = False) -> None:
        self.independent = independent
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        """One step: [s, b, h, d], [s, b, g, d] twice to [s, b, h d], as megatron-core calls it."""
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        if self.independent:
            self.keys, self.values = [], []
        self.keys.append(key)
        self.values.append(value)
        first = len(self.keys) == 1
        result = _causal(query, key, value) if first else self._over_steps(query)
        return result.permute(2, 0, 1, 3).flatten(-2)

    def _over_steps(self, query: torch.Tensor) -> torch.Tensor:
        if flash_attention.available(query) and query.shape[2] >= len(self.keys):
            return flash_attention.over_steps(query, self.keys, self.values)
        return self._in_chunks(query)

    def _in_chunks(self, query: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        per_chunk = max(SMALLEST_CHUNK, CHUNK_ELEMENTS // (batch * heads * length))
        if per_chunk >= length:
            return _rows(query, self.keys, self.values, 0, length)
        parts = []
        for start in range(0, length, per_chunk):
            stop = min(start + per_chunk, length)
            rows = partial(_rows, start=start, stop=stop)
            parts.append(
                checkpoint(
                    rows,
                    query[:, :, start:stop],
                    list(self.keys),  # later steps add to the lists
                    list(self.values),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            )
        return torch.cat(parts, dim=2)


@contextlib.contextmanager
def over_steps(draft: Any, independent: bool = False) -> Iterator[None]:
    """Within this context each call of the draft is the next step of training-time test."""
    attentions = [layer.self_attention.core_attention for layer in draft.decoder.layers]
    for attention in attentions:
        # An attribute of the instance stands before the method of its class.
        attention.forward = _as_forward(StepAttention(independent))
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


def _as_forward(attention: StepAttention) -> Callable[..., torch.Tensor]:
    return attention.__call__


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[b, h, s, d] and [b, g, s, d] twice to [b, h, s, d], by PyTorch's fused kernels."""
    repeats = query.shape[1] // key.shape[1]
    grouped = repeats > 1 and query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if repeats > 1 and not grouped:
        key = key.repeat_interleave(repeats, dim=1)
        value = value.repeat_interleave(repeats, dim=1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def _rows(
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    start: int,
    stop: int,
) -> torch.Tensor:
    """Queries of rows ``start`` to ``stop`` at the last step: [b, h, stop - start, d] to the same.

    Rows below ``k`` have no predecessor at every step; what they get is not used.
    """
    step = len(keys) - 1
    _, heads, _, size = query.shape
    groups = keys[0].shape[1]
    scale = 1.0 / math.sqrt(size)
    seen = max(1, stop - step)
    # [b, g, r, c, d]: r query heads share the keys of a group.
    grouped = query.unflatten(1, (groups, heads // groups))
    first = torch.matmul(grouped.flatten(2, 3), keys[0][:, :, :seen].transpose(-1, -2)).unflatten(
        2, grouped.shape[2:4]
    )
    row = torch.arange(start, stop, device=query.device)[:, None]
    key_row = torch.arange(seen, device=query.device)[None, :]
    scores = [(first.float() * scale).masked_fill(key_row > row - step, float("-inf"))]
    own = []
    for m in range(1, step + 1):
        key, value = (_shifted(each[m], step - m, start, stop) for each in (keys, values))
        own.append(value)
        score = (grouped.float() * key[:, :, None].float()).sum(-1, keepdim=True)
        scores.append(score * scale)
    weights = torch.softmax(torch.cat(scores, dim=-1), dim=-1).to(query.dtype)
    result = torch.matmul(weights[..., :seen].flatten(2, 3), values[0][:, :, :seen]).unflatten(
        2, grouped.shape[2:4]
    )
    for m, value in enumerate(own):
        result = result + weights[..., seen + m : seen + m + 1] * value[:, :, None]
    return result.flatten(1, 2)


def _shifted(tensor: torch.Tensor, by: int, start: int, stop: int) -> torch.Tensor:
    """Rows ``start - by`` to ``stop - by`` of [b, g, s, d]; zeros before the first."""
    missing = max(0, min(by - start, stop - start))
    rows = tensor[:, :, max(0, start - by) : max(0, stop - by)]
    return F.pad(rows, (0, 0, missing, 0)) if missing else rows
