"""What Llama 4's attention does beside megatron-core's: chunks, temperature, norms of some layers.

Hooks of the core attention, so that ModelOpt's classes for quantized keys and values stay in place.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.identity_op import IdentityOp
from torch.nn import functional

from post_training.models.architecture import Architecture


def attach(model: Any, architecture: Architecture) -> None:
    """Let the layers of ``model``, this rank's part, attend as ``architecture`` says."""
    chunks, temperature = architecture.attention_chunks, architecture.attention_temperature
    unrotated = model.config.no_rope_freq
    for layer in model.decoder.layers:
        attention, index = layer.self_attention, layer.layer_number - 1
        if unrotated and unrotated[index]:
            # Only rotated queries and keys are normalized; the norms have no weights.
            attention.q_layernorm = attention.k_layernorm = IdentityOp()
        # Ministral 3's layers are all rotated, and all have the factor.
        if temperature is not None and (not unrotated or unrotated[index]):
            first = int(temperature.get("from", 1))
            hook = tempering(temperature["floor_scale"], temperature["scale"], first)
            attention.core_attention.register_forward_pre_hook(hook)
        if chunks is not None and chunks["layers"][index]:
            chunk(attention.core_attention, chunks["size"])


def tempering(floor: float, scale: float, first: int = 1) -> Callable[..., Any]:
    """A forward pre-hook of a core attention; ``first`` is the number of the first position."""
    return partial(_temper, floor, scale, first)


def chunk(core: torch.nn.Module, size: int) -> None:
    """Let each query of a core attention see its chunk alone."""
    core.register_forward_pre_hook(partial(_divide, size))
    core.register_forward_hook(_join)


def _temper(
    floor: float, scale: float, first: int, _core: Any, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Multiply queries [sq, b, h, d] by a factor that grows with their positions.

    The last query has the position of the last key, of a cache or not.
    """
    query, key, *others = inputs
    positions = torch.arange(len(key) - len(query), len(key), device=query.device)
    factors = torch.log1p(torch.floor((positions.float() + first) / floor)) * scale + 1.0
    return (query * factors[:, None, None, None]).to(query.dtype), key, *others


def _divide(size: int, core: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Let each query attend to its chunk alone: positions ``size`` at a time, from 0.

    A text without a cache becomes a batch of its chunks, the last one padded behind its end, where
    causal attention does not look. A query after a cache sees the keys of its chunk, and several
    queries get a mask.
    """
    query, key, value, mask, *others = inputs
    queries, keys = len(query), len(key)
    core.divided = None
    if keys <= size:
        return None
    if queries == 1:
        start = (keys - 1) // size * size
        mask = None if mask is None else mask[..., start:]
        return query, key[start:], value[start:], mask, *others
    if mask is not None and mask.shape[-2:] == (queries, keys):
        chunks = torch.arange(keys, device=query.device) // size
        return query, key, value, mask | (chunks[-queries:, None] != chunks), *others
    if queries != keys:
        raise ValueError("several queries after a cache need a mask")
    core.divided = (queries, query.shape[1])
    parts = (_chunks(each, size) for each in (query, key, value))
    return *parts, None, *others


def _chunks(each: torch.Tensor, size: int) -> torch.Tensor:
    """[s, b, h, d] to [size, chunks * b, h, d]."""
    padded = functional.pad(each, (0, 0, 0, 0, 0, 0, 0, -len(each) % size))
    return padded.unflatten(0, (-1, size)).transpose(0, 1).flatten(1, 2)


def _join(core: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
    """[size, chunks * b, h * d] to [s, b, h * d]."""
    if core.divided is None:
        return None
    length, batch = core.divided
    core.divided = None
    return output.unflatten(1, (-1, batch)).transpose(0, 1).flatten(0, 1)[:length]
