"""GPTQ: integer weights whose rounding errors compensate one another, layer after layer.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022. The inputs of a layer come from the layers before it as they are already
quantized, and within a layer one kind of linear follows the other (q, k, v; output; gate, up;
down), so the Hessians in memory are those of one kind: a linear of n inputs has float32 [n, n]. The
calibration's hidden states, one layer's, lie on the device where they are a small part of it, else
in host memory.

ModelOpt's ``gptq`` is not used: it sums Hessians of no replicas, keeps scales that engines do not
read (they are rounded to bfloat16 here before a column is), and has no answer for experts
that few tokens chose.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from megatron.core import parallel_state
from megatron.core.inference.utils import InferenceMode
from megatron.core.transformer import MegatronModule
from tqdm import tqdm

from post_training.common.errors import UsageError
from post_training.distributed.collectives import from_all_ranks
from post_training.inference import forward, generation, layerwise
from post_training.quantization import (
    calibration,
    expert_reach,
    experts,
    gptq_checks,
    gptq_rounding,
    layer_names,
    quantizers,
    scale_rounding,
)
from post_training.quantization.calibration import Calibration
from post_training.quantization.formats import registry as formats
from post_training.quantization.layer_names import first_names, global_name

# Linears that read what the others of their module compute.
_LAST = ("linear_proj", "linear_fc2", "out_proj")
_HESSIAN_BYTES = 8 << 30  # of all linears whose inputs are collected in one run


class _Hessian:
    """Sum of x x^T over the inputs x of a linear, float32 [in, in], and how many there were."""

    def __init__(self, linear: Any) -> None:
        size = linear.weight.shape[1]
        self.sum = torch.zeros(size, size, dtype=torch.float32, device=linear.weight.device)
        self.tokens = 0

    def add(self, _module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        rows = arguments[0].detach().reshape(-1, len(self.sum)).float()
        self.sum.addmm_(rows.T, rows)
        self.tokens += len(rows)

    def of_all_replicas(self, *, expert: bool) -> None:
        """Sum over the data-parallel ranks; a collective call."""
        _, size, group = generation.data_parallel()
        if size > 1:
            torch.distributed.all_reduce(self.sum, group=group)
        self.tokens = sum(from_all_ranks(self.tokens, group))
        if expert:
            # Expert-parallel ranks run the same batches, and each sends its tokens to the expert.
            self.tokens //= parallel_state.get_expert_model_parallel_world_size()


@dataclass
class _Found:
    """Squared output error over that of rounding to nearest, by expert-parallel rank (0 for what
    all have) and name; None where the weight is rounded to nearest."""

    ratios: dict[tuple[int, str], float | None]

    def of_all_ranks(self) -> dict[str, Any]:
        """For the manifest; a collective call."""
        every: dict[tuple[int, str], float | None] = {}
        for each in from_all_ranks(self.ratios):
            every.update(each)
        known = [max(ratio, 1e-12) for ratio in every.values() if ratio is not None]
        mean = math.exp(sum(map(math.log, known)) / len(known)) if known else 1.0
        nearest = sorted(key for key, ratio in every.items() if ratio is None)
        return {
            "linears": len(known),
            "error_ratio": round(mean, 4),
            "rounded_to_nearest": [f"{name} (EP rank {n})" if n else name for n, name in nearest],
        }


def calibrate(
    model: MegatronModule,
    data: Calibration,
    forward_loop: Callable[[torch.nn.Module], None] | None = None,
) -> None:
    """Quantize the weights of all decoder layers in place and set their scales; a collective call.

    Afterwards fake quantization returns these weights as they are. ``data.gptq`` tells what was
    done.

    Args:
        forward_loop: runs the data through the model, where other quantizers need maxima.

    Raises:
        UsageError: on every rank, for TP or PP > 1, number formats other than INT8 per channel and
            INT4 blocks, quantized inputs, too little data, or inputs that are not finite.
    """
    gptq_checks.require_whole_layers(
        "the calibration method gptq",
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )
    started = time.monotonic()
    core = forward.unwrap(model)
    names = {id(module): global_name(model, name) for name, module in model.named_modules()}
    layers = [(layer, _kinds(layer)) for layer in core.decoder.layers]
    _check([each for _, kinds in layers for kind in kinds for each in kind], data)
    mtq.calibrate(model, "max", forward_loop=forward_loop)
    calibration.settle_zeros(model)
    scale_rounding.round_scales(model)
    found = _Found(data.ratios)
    batches = data.batches()
    data.forget_expert_tokens()
    with torch.no_grad(), InferenceMode.active():
        others, states = data.enter(core, batches)
        bar = tqdm(layers, desc="rounding", unit=" layers", disable=not data.show_progress)
        for (layer, kinds), given in zip(bar, others, strict=True):
            observe = partial(_observe, layer, states, given, data)
            with _off([module for kind in kinds for module in kind]):
                for part in itertools.chain.from_iterable(map(_parts, kinds)):
                    _quantize(part, observe, names, found)
            with experts.counting(layer, data.expert_tokens):
                states = layerwise.outputs(layer, states, given)
    data.leave(states, sum(batch.numel() for batch in batches))
    data.gptq.update(found.of_all_ranks())
    data.seconds += time.monotonic() - started


def describe(found: Mapping[str, Any]) -> str:
    """A line for a summary, of :attr:`Calibration.gptq`."""
    names = found["rounded_to_nearest"]
    text = f"{found['linears']} linears, {found['error_ratio']:.3f} of the squared output error"
    return text + (
        f"; {len(names)} rounded to nearest, with fewer tokens than inputs or nothing to gain: "
        f"{first_names(names)}"
        if names
        else ""
    )


def _kinds(layer: torch.nn.Module) -> list[list[Any]]:
    """The layer's quantized linears by kind, in the order in which data passes them.

    A kind is one linear, or the same linear of all experts.
    """
    kinds: dict[str, list[Any]] = {}
    for name, module in layer.named_modules():
        if quantizers.linear_of(module) is not None:
            kinds.setdefault(experts.without_number(name), []).append(module)
    parents = list(dict.fromkeys(name.rpartition(".")[0] for name in kinds))

    def place(name: str) -> tuple[int, bool]:
        parent, _, own = name.rpartition(".")
        return parents.index(parent), own in _LAST

    return [kinds[name] for name in sorted(kinds, key=place)]


def _check(linears: list[Any], data: Calibration) -> None:
    """Raise UsageError, on every rank, for what cannot be done."""
    wrong = set()
    for module in linears:
        form = quantizers.linear_of(module)
        weight = formats.WEIGHTS.get(form.weight) if form else None
        if form and (weight is None or not weight.integer or form.input):
            wrong.add(f"{form.weight} with {form.input or '16-bit'} inputs")
    found = sorted(set().union(*from_all_ranks(wrong)))
    if found:
        raise UsageError(
            f"the calibration method gptq for {found[0]}",
            "it makes INT8 weights with a scale per output, and INT4 in blocks; inputs stay in 16 "
            "bits",
            "choose INT4_GPTQ_CFG or INT8_GPTQ_CFG",
        )
    tokens = data.data.input_ids.numel()
    needed = min((module.weight.shape[1] for module in linears), default=0)
    if max(from_all_ranks(needed)) > tokens:
        raise UsageError(
            f"{tokens} tokens of calibration data",
            f"GPTQ needs at least as many as a linear has inputs, here {needed} or more",
            "give more data: --calib-size, --calib-max-sequence-length",
        )


@contextlib.contextmanager
def _off(linears: list[Any]) -> Iterator[None]:
    """In the context weights that are not quantized yet are computed with as they are."""
    for module in linears:
        module.weight_quantizer.disable()
    try:
        yield
    finally:
        for module in linears:
            module.weight_quantizer.enable()


def _parts(kind: list[Any]) -> Iterator[list[Any]]:
    """The linears of a kind, as many at a time as there is memory for their Hessians."""
    size = max(1, _HESSIAN_BYTES // (4 * kind[0].weight.shape[1] ** 2))
    for start in range(0, len(kind), size):
        yield kind[start : start + size]


def _observe(
    layer: torch.nn.Module,
    states: list[torch.Tensor],
    others: layerwise.Arguments,
    data: Calibration,
    hooks: list[tuple[Any, layerwise.Hook]],
    *,
    of_experts: bool,
) -> None:
    """Run the layer and tell each hook its module's inputs; a collective call for experts."""
    if not of_experts:
        layerwise.observe(layer, states, others, hooks)
        return
    added: experts.ExpertTokens = {}
    with expert_reach.reaching(layer, data.expert_share, added):
        layerwise.observe(layer, states, others, hooks, to_end=True)
    data.expert_tokens_added.update(added)


def _quantize(
    kind: list[Any],
    observe: Callable[..., None],
    names: Mapping[int, str],
    found: _Found,
) -> None:
    """Quantize linears of one kind from their inputs in one run of the layer."""
    hessians = [_Hessian(module) for module in kind]
    hooks = [(module, hessian.add) for module, hessian in zip(kind, hessians, strict=True)]
    observe(hooks, of_experts=layer_names.is_expert(names[id(kind[0])]))
    broken = set()
    for module, hessian in zip(kind, hessians, strict=True):
        name = names[id(module)]
        is_expert = layer_names.is_expert(name)
        hessian.of_all_replicas(expert=is_expert)
        ratio = None
        if not hessian.sum.isfinite().all():
            broken.add(name)
        elif hessian.tokens >= module.weight.shape[1]:
            ratio = gptq_rounding.quantize(module, hessian.sum)
        _agree(module, expert=is_expert)
        rank = parallel_state.get_expert_model_parallel_rank() if is_expert else 0
        found.ratios[rank, name] = ratio
        module.weight_quantizer.enable()
        hessian.sum = hessian.sum.new_empty(0)
    every = sorted(set().union(*from_all_ranks(broken)))
    if every:
        raise UsageError(
            f"the inputs of {first_names(every)}",
            "they are not finite on the calibration data",
            "give --bf16 or --fp32, or other data",
        )


def _agree(linear: Any, *, expert: bool) -> None:
    """Give the first replica's weight and scales to the others; a collective call."""
    group = (
        parallel_state.get_expert_data_parallel_group()
        if expert
        else parallel_state.get_data_parallel_group()
    )
    if torch.distributed.get_world_size(group) > 1:
        for tensor in (linear.weight.data, linear.weight_quantizer._amax):
            torch.distributed.broadcast(tensor, group=group, group_src=0)
