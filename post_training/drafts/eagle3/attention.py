"""Attention of a draft over the steps of training-time test, in memory linear in the length.

At step ``k`` the draft reads what it made at step ``k - 1``, as it will when it is used. A query of
row ``i`` then sees (Li et al. 2025, arXiv:2503.01840, figure 7; the drawing in ModelOpt's
``set_multi_step_attention_mask`` is the same)

- keys of step 0 (from the target's states) of rows ``0 .. i - k``,
- of each later step ``m`` up to ``k`` the one key of row ``i - k + m``.

A [s, (k + 1) s] mask, which grows with the square of the length, never exists. Queries from row
``k`` on, against the keys of step 0 without the last ``k``, are an ordinary causal product: a fused
kernel of PyTorch's computes it, together with the logarithm of each row's normaliser. The few
further scores are merged in through those logarithms. Backward, the kernel gets the merged output
and normaliser, which is all by which its part depends on the rest: the way ring attention splits a
row (Liu et al. 2023, arXiv:2310.01889; Dao 2023, arXiv:2307.08691, section 3.1).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

# What the kernels on a GPU need of a head's size: the most of the flash kernel, and a divisor.
_LARGEST_FLASH_HEAD, _HEAD_MULTIPLE = 256, 8
_EFFICIENT_ROWS = 32  # the memory-efficient kernel keeps its normalisers for a multiple of these


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
        """One step: [s, b, h, d], [s, b, g, d] twice to [s, b, h d], as megatron-core calls it.

        Rows without a predecessor at every step, which are not used, become zero.
        """
        query, key, value = (each.permute(1, 2, 0, 3) for each in (query, key, value))
        if self.independent or not self.keys:
            self.keys, self.values = [key], [value]
            result = _causal(query, key, value)
        else:
            self.keys.append(key)
            self.values.append(value)
            result = _over_steps(query, self.keys, self.values)
        return result.permute(2, 0, 1, 3).flatten(-2)


@contextlib.contextmanager
def over_steps(draft: Any, independent: bool = False) -> Iterator[None]:
    """Within this context each call of the draft is the next step of training-time test."""
    attentions = [layer.self_attention.core_attention for layer in draft.decoder.layers]
    for attention in attentions:
        # An attribute of the instance stands before the method of its class.
        attention.forward = StepAttention(independent)
    try:
        yield
    finally:
        for attention in attentions:
            del attention.forward


def _causal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[b, h, s, d] and [b, g, s, d] twice to [b, h, s, d], by PyTorch's fused kernels."""
    repeats = query.shape[1] // key.shape[1]
    grouped = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    if not grouped:
        key, value = _for_heads(key, repeats), _for_heads(value, repeats)
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=grouped and repeats > 1
    )


def _over_steps(
    query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Queries [b, h, s, d] of the last step against two or more steps' keys and values."""
    later, size = len(keys) - 1, query.shape[-1]
    rows = query.shape[2] - later
    if rows <= 0:
        return torch.zeros_like(query)
    # Of each step what the queries see: row by row, of the first one also all rows before.
    seen = [each[m][:, :, m : m + rows] for each in (keys, values) for m in range(len(keys))]
    tensors = [query[:, :, later:], *seen]
    if size % _HEAD_MULTIPLE:
        tensors = [F.pad(each, (0, -size % _HEAD_MULTIPLE)) for each in tensors]
    result: torch.Tensor = _OverSteps.apply(1.0 / math.sqrt(size), *tensors)
    return F.pad(result[..., :size], (0, 0, later, 0))


class _OverSteps(torch.autograd.Function):
    """Queries [b, h, n, d]; of each step keys [b, g, n, d], then values alike."""

    @staticmethod
    def forward(ctx: Any, scale: float, query: torch.Tensor, *both: torch.Tensor) -> torch.Tensor:
        keys, values = _of_heads(query, both)
        output, normaliser, ctx.kernel = _forward(query, next(keys), next(values), scale)
        scores = [_scores(query, key, scale) for key in keys]
        merged = torch.logsumexp(torch.stack([normaliser, *scores]), dim=0)
        # float32: a sum of few terms, rounded once.
        result = output.float() * (normaliser - merged).exp().unsqueeze(-1)
        for score, value in zip(scores, values, strict=True):
            result = result + (score - merged).exp().unsqueeze(-1) * value
        result = result.to(query.dtype)
        ctx.save_for_backward(query, *both, result, merged)
        ctx.scale = scale
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, *both, result, merged = ctx.saved_tensors
        query, gradient, scale = query.contiguous(), gradients[0].contiguous(), ctx.scale
        groups = both[0].shape[1]

        def of_groups(each: torch.Tensor) -> torch.Tensor:
            """Query heads share the keys of a group: their gradients add up."""
            return each.unflatten(1, (groups, -1)).sum(2).to(query.dtype)

        keys, values = _of_heads(query, both)
        whole_row = (query, next(keys), next(values), result, merged)
        of_query, of_key, of_value = _backward(gradient, *whole_row, scale, ctx.kernel)
        of_query, of_keys, of_values = of_query.float(), [of_groups(of_key)], [of_groups(of_value)]
        delta = (gradient.float() * result).sum(-1)
        for key, value in zip(keys, values, strict=True):
            weight = (_scores(query, key, scale) - merged).exp()
            score = scale * weight * ((gradient.float() * value).sum(-1) - delta)
            of_query += score.unsqueeze(-1) * key
            of_keys.append(of_groups(score.unsqueeze(-1) * query))
            of_values.append(of_groups(weight.unsqueeze(-1) * gradient))
        return (None, of_query.to(query.dtype), *of_keys, *of_values)


def _of_heads(
    query: torch.Tensor, both: Sequence[torch.Tensor]
) -> tuple[Iterator[torch.Tensor], Iterator[torch.Tensor]]:
    """The keys and the values of each step, repeated for each head of the queries."""
    repeats, steps = query.shape[1] // both[0].shape[1], len(both) // 2
    repeated = (_for_heads(each, repeats) for each in both[:steps])
    return repeated, (_for_heads(each, repeats) for each in both[steps:])


def _scores(query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
    """Of each query with its one key: float32 [b, h, rows]."""
    return (query.float() * key).sum(-1) * scale


def _for_heads(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
    """[b, g, s, d] to [b, g r, s, d]: r query heads share the keys of a group."""
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)


def _has_flash(query: torch.Tensor) -> bool:
    """Whether PyTorch's flash kernel takes this type and head size on this GPU."""
    return (
        query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= _LARGEST_FLASH_HEAD
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, list[Any]]:
    """Causal attention: output, logarithm of the normaliser [b, h, s], and the kernel's state."""
    aten, on_cpu = torch.ops.aten, query.device.type == "cpu"
    if on_cpu or _has_flash(query):
        flash = aten._scaled_dot_product_flash_attention
        kernel = aten._scaled_dot_product_flash_attention_for_cpu if on_cpu else flash
        output, normaliser, *state = kernel(query, key, value, 0.0, True, scale=scale)
    else:
        output, normaliser, *state = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, 0.0, True, scale=scale
        )
    return output, normaliser[..., : query.shape[2]], state


def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    normaliser: torch.Tensor,
    scale: float,
    state: list[Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, given the whole row's output and normaliser."""
    aten = torch.ops.aten
    if query.device.type == "cpu":
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            gradient, query, key, value, output, normaliser, 0.0, True, scale=scale
        )
    elif _has_flash(query):
        *lengths, random_state, unused = state[:6]
        found = aten._scaled_dot_product_flash_attention_backward(
            *(gradient, query, key, value, output, normaliser),
            *lengths,
            *(0.0, True, random_state, unused),
            scale=scale,
        )
    else:
        # The kernel's own normalisers are padded so.
        padding = (0, -normaliser.shape[-1] % _EFFICIENT_ROWS)
        normaliser = F.pad(normaliser, padding, value=math.inf)
        found = aten._scaled_dot_product_efficient_attention_backward(
            *(gradient, query, key, value, None, output, normaliser),
            *state,
            *(0.0, [True, True, True, False], True),
            scale=scale,
        )
    return found[0], found[1], found[2]
