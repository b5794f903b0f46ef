"""Experts during calibration: how many tokens each got, and a scale for those that got none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.moe.router import Router
from modelopt.torch.quantization.calib import MaxCalibrator

from post_training.distributed.collectives import from_all_ranks
from post_training.inference import generation
from post_training.quantization import quantizers
from post_training.quantization.layer_names import EXPERT, global_name, is_expert

# Number of the layer, from 0 -> tokens that each of its experts got.
ExpertTokens = dict[int, list[int]]


@contextlib.contextmanager
def counting(model: torch.nn.Module, counts: ExpertTokens) -> Iterator[dict[int, torch.Tensor]]:
    """Add to ``counts`` the tokens that the routers of all ranks send to each expert in the block.

    The end of the block is a collective call. Within it this rank's tokens are in what it yields,
    whose tensors do not change.
    """
    mine: dict[int, torch.Tensor] = {}

    def count(layer: int, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        chosen = output[1].sum(0)  # of bool [tokens, experts]
        mine[layer] = mine[layer] + chosen if layer in mine else chosen

    with contextlib.ExitStack() as stack:
        for router in model.modules():
            if isinstance(router, Router):
                layer: Any = router.layer_number
                stack.callback(router.register_forward_hook(partial(count, layer - 1)).remove)
        yield mine
    add(counts, mine)


def add(counts: ExpertTokens, mine: Mapping[int, torch.Tensor]) -> None:
    """Add this rank's tokens by layer and those of all others to ``counts``; a collective call."""
    # Tensor- and expert-parallel ranks of a replica routed the same tokens.
    replica, _, _ = generation.data_parallel()
    gathered = from_all_ranks({(n, replica): sent.tolist() for n, sent in mine.items()})
    found = {key: sent for each in gathered for key, sent in each.items()}
    for (layer, _), sent in sorted(found.items()):
        before = counts.get(layer, [0] * len(sent))
        counts[layer] = [a + b for a, b in zip(before, sent, strict=True)]


def settle_idle(model: torch.nn.Module) -> None:
    """While maxima are collected, give experts that got no token their layer's largest input.

    A collective call. ModelOpt gives all experts of a layer the largest of their maxima, but only
    within a rank: it fails if one expert-parallel rank got no token at all.
    """
    collecting: dict[str, list[Any]] = {}
    for name, quantizer in quantizers.enabled(model):
        calibrator = getattr(quantizer, "_calibrator", None)
        is_input = name.endswith("input_quantizer") and quantizer._if_calib
        if is_input and is_expert(name) and isinstance(calibrator, MaxCalibrator):
            collecting.setdefault(layer_name(model, name), []).append(quantizer)
    largest: dict[str, float] = {}
    for name, siblings in collecting.items():
        maxima = [each._calibrator.compute_amax() for each in siblings]
        # One value a tensor; other granularities have no common maximum.
        known = [float(amax) for amax in maxima if amax is not None and amax.numel() == 1]
        if known:
            largest[name] = max(known)
    for each in from_all_ranks(dict(largest)):
        for name, value in each.items():
            largest[name] = max(value, largest.get(name, value))
    device = next(model.parameters()).device
    for name, siblings in collecting.items():
        for quantizer in siblings:
            if quantizer._calibrator.compute_amax() is None and name in largest:
                quantizer._calibrator.collect(torch.tensor([largest[name]], device=device))


def layer_name(model: torch.nn.Module, name: str) -> str:
    """The module's name in the whole model, without the number of the expert."""
    return without_number(global_name(model, name))


def without_number(name: str) -> str:
    """The module's name, the same for all experts of a layer."""
    return EXPERT.sub(".local_experts.*.", name)
