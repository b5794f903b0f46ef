"""A draft's attention over the steps of training-time test with PyTorch's flash kernels.

At step ``k`` a query of row ``i`` sees the keys of step 0 up to row ``i - k`` and one key of each
later step (:mod:`post_training.drafts.eagle3.attention`). Queries from row ``k`` on, against the
keys of step 0 without the last ``k``, are an ordinary causal product: the flash kernel computes it
in memory linear in the length, together with the logarithm of each row's normaliser. The few
further scores are merged in through those logarithms. Backward, the kernel gets the merged output
and normaliser, which is all by which its part depends on the rest: the way ring attention splits a
row (Liu et al. 2023, arXiv:2310.01889; Dao 2023, arXiv:2307.08691, section 3.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

_LARGEST_HEAD = 256


def available(query: torch.Tensor) -> bool:
    """Whether PyTorch has a flash kernel for this device, type and head size."""
    if query.device.type == "cpu":
        return True
    half = query.dtype in (torch.float16, torch.bfloat16)
    size = query.shape[-1]
    return (
        query.device.type == "cuda"
        and half
        and size % 8 == 0
        and size <= _LARGEST_HEAD
        and torch.backends.cuda.flash_sdp_enabled()
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def over_steps(
    query: torch.Tensor, keys: Sequence[torch.Tensor], values: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Queries of the last step against the keys and values of all steps so far.

    Args:
        query: [b, h, s, d].
        keys, values: one [b, g, s, d] for each step, two or more; g divides h.

    Returns:
        [b, h, s, d]; the first ``len(keys) - 1`` rows, which have no predecessor at every step, are
        zero.
    """
    result: torch.Tensor = _OverSteps.apply(len(keys), query, *keys, *values)
    return result


class _OverSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, query: torch.Tensor, *both: torch.Tensor) -> torch.Tensor:
        later = count - 1
        rows = query.shape[2] - later
        keys, values = both[:count], both[count:]
        repeats = query.shape[1] // keys[0].shape[1]
        part = query[:, :, later:]
        key, value = (_for_heads(each[0][:, :, :rows], repeats) for each in (keys, values))
        output, normaliser, kernel = _forward(part, key, value)
        scores = [_scores(part, _rows_of(keys, m, rows, repeats)) for m in range(1, count)]
        merged = torch.logsumexp(torch.stack([normaliser, *scores]), dim=0)
        # float32: a sum of few terms, rounded once.
        result = output.float() * (normaliser - merged).exp().unsqueeze(-1)
        for m, score in enumerate(scores, start=1):
            weight = (score - merged).exp().unsqueeze(-1)
            result = result + weight * _rows_of(values, m, rows, repeats)
        result = result.to(query.dtype)
        ctx.save_for_backward(query, *both, result, merged)
        ctx.kernel, ctx.count = kernel, count
        return F.pad(result, (0, 0, later, 0))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, *both, result, merged = ctx.saved_tensors
        count = ctx.count
        later, length = count - 1, query.shape[2]
        rows = length - later
        keys, values = both[:count], both[count:]
        repeats = query.shape[1] // keys[0].shape[1]
        part = query[:, :, later:].contiguous()
        gradient = gradients[0][:, :, later:].contiguous()
        key, value = (_for_heads(each[0][:, :, :rows], repeats) for each in (keys, values))
        found = _backward(gradient, part, key, value, result, merged, ctx.kernel)
        query_gradient = found[0].float()
        first = [F.pad(_for_groups(each, repeats), (0, 0, 0, later)) for each in found[1:]]
        key_gradients, value_gradients = [first[0]], [first[1]]
        scale = 1.0 / math.sqrt(query.shape[-1])
        delta = (gradient.float() * result).sum(-1)
        for m in range(1, count):
            key, value = _rows_of(keys, m, rows, repeats), _rows_of(values, m, rows, repeats)
            weight = (_scores(part, key) - merged).exp()
            score = scale * weight * ((gradient.float() * value).sum(-1) - delta)
            query_gradient += score.unsqueeze(-1) * key
            # Key m of row j is seen by the row j + later - m alone.
            sides = (0, 0, m, later - m)
            for target, made in (
                (key_gradients, score.unsqueeze(-1) * part),
                (value_gradients, weight.unsqueeze(-1) * gradient),
            ):
                target.append(F.pad(_for_groups(made, repeats), sides).to(query.dtype))
        whole = F.pad(query_gradient.to(query.dtype), (0, 0, later, 0))
        return (None, whole, *key_gradients, *value_gradients)


def _rows_of(each: Sequence[torch.Tensor], m: int, rows: int, repeats: int) -> torch.Tensor:
    """What the queries see of a later step ``m``: a row each, [b, h, rows, d]."""
    return _for_heads(each[m][:, :, m : m + rows], repeats)


def _scores(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Of each query with its one key: float32 [b, h, rows]."""
    return (query.float() * key).sum(-1) / math.sqrt(query.shape[-1])


def _for_heads(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
    """[b, g, s, d] to [b, g r, s, d]: r query heads share the keys of a group."""
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=1)


def _for_groups(tensor: torch.Tensor, repeats: int) -> torch.Tensor:
    """The gradient's way back: [b, g r, s, d] to [b, g, s, d]."""
    return tensor if repeats == 1 else tensor.unflatten(1, (-1, repeats)).sum(2)


def _forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]]:
    """Causal attention: output, logarithm of the normaliser [b, h, s], and the kernel's state."""
    if query.device.type == "cpu":
        output, normaliser = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True
        )
        return output, normaliser, ()
    output, normaliser, *state = torch.ops.aten._scaled_dot_product_flash_attention(
        query, key, value, 0.0, True
    )
    return output, normaliser, tuple(state[:6])


def _backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    normaliser: torch.Tensor,
    state: tuple[Any, ...],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, given the whole row's output and normaliser."""
    tensors = (gradient, query, key, value, output, normaliser)
    if query.device.type == "cpu":
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, 0.0, True
        )
    else:
        *lengths, random_state, unused = state
        found = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *tensors, *lengths, 0.0, True, random_state, unused
        )
    return found[0], found[1], found[2]
