"""Largest magnitudes of weights and of what calibration saw, by linear layer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from post_training.distributed.collectives import from_all_ranks
from post_training.quantization import layer_names, quantizers

_EXPERT = re.compile(r"\.local_experts\.\d+\.")
# Of what is not a weight; Megatron calls a layer's input activations.
_KINDS = {"input_quantizer": "input", "k_bmm_quantizer": "keys", "v_bmm_quantizer": "values"}


def of_model(model: torch.nn.Module) -> dict[str, dict[str, float]]:
    """By layer, the largest magnitudes of its ``weight`` and ``input``, of ``keys`` and ``values``.

    Of a layer's experts the largest of all. Inputs are those of calibration: formats that look at
    each input while they compute have none. A collective call; the same on every rank.

    Args:
        model: this rank's part, calibrated, its weights not packed.
    """
    found: dict[str, dict[str, float]] = {}
    for mine in from_all_ranks(list(_of_rank(model))):
        for name, kind, value in mine:
            of_layer = found.setdefault(name, {})
            of_layer[kind] = max(value, of_layer.get(kind, 0.0))
    return found


def _of_rank(model: torch.nn.Module) -> Iterator[tuple[str, str, float]]:
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    for name, module in model.named_modules():
        if tied and name == "output_layer":
            continue  # on another pipeline stage than the embedding a copy of it
        if quantizers.is_linear(module):
            low, high = torch.aminmax(module._parameters["weight"].detach())
            yield _layer(model, name), "weight", max(-float(low), float(high))
    for name, quantizer in quantizers.enabled(model):
        module, _, own = name.rpartition(".")
        amax: Any = quantizer.amax if quantizers.needs_amax(quantizer) else None
        if own in _KINDS and amax is not None:
            yield _layer(model, module), _KINDS[own], float(amax.max())


def _layer(model: Any, name: str) -> str:
    return _EXPERT.sub(".local_experts.*.", layer_names.global_name(model, name))
