"""The quantizers of a model: the number formats they round to, and what they can be exported as."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

from post_training.distributed.collectives import from_all_ranks
from post_training.quantization import fused_rows, kernels, layer_names
from post_training.quantization.engines import registry as engines
from post_training.quantization.formats import exportable
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import (
    EXTRA_OF_METHOD,
    LOW_RANK,
    NO_KV_CACHE,
    PRE_QUANT_SCALE,
    Linear,
)
from post_training.quantization.formats.exportable import Verdict


def enabled(model: torch.nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Name and quantizer of each that is enabled."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            yield name, module


@contextlib.contextmanager
def not_rounding(model: torch.nn.Module) -> Iterator[None]:
    """In the block quantizers are called, and return what they are given."""
    rounding = [quantizer for _, quantizer in enabled(model) if quantizer._if_quant]
    for quantizer in rounding:
        quantizer.disable_quant()
    try:
        yield
    finally:
        for quantizer in rounding:
            quantizer.enable_quant()


def needs_amax(quantizer: TensorQuantizer) -> bool:
    """Whether the quantizer computes with a stored maximum.

    Microscaling formats take a power of two from each block, dynamic ones look at each input, and
    some recipes fix the constant.
    """
    is_dynamic = quantizer.is_mx_format or getattr(quantizer, "_dynamic", False)
    return not (is_dynamic or getattr(quantizer, "_use_constant_amax", False))


def scale_of(amax: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
    """The scales of these maxima, float32, correctly rounded on every device.

    On CUDA PyTorch multiplies by the inverse of a number that it is to divide by, which may miss a
    scale that was multiplied before; in float64 the error is lost when the result is rounded.
    """
    return (amax.double() / quantizer.maxbound).float()


def _number_format(quantizer: Any, *, is_input: bool = False) -> str:
    """Name of the quantizer's number format, or a description if none matches."""
    if isinstance(quantizer, SequentialQuantizer):
        parts = tuple(_number_format(each) for each in quantizer)
        whole = (row.name for row in formats.WEIGHTS.values() if row.parts == parts)
        return next(whole, "+".join(parts))
    found = formats.number_format(quantizer, is_input=is_input)
    if found:
        return found.name
    blocks = dict(quantizer.block_sizes or {})
    return f"{quantizer.num_bits} bits with blocks {blocks} and axis {quantizer.axis}"


def linear_of(module: torch.nn.Module, method: str = "") -> Linear | None:
    """How a linear layer is quantized; None if its weight is not.

    Args:
        method: of the calibration that is still to come, which may add to the layer.
    """
    quantizer: Any = getattr(module, "weight_quantizer", None)
    if quantizer is None or not quantizer.is_enabled:
        return None
    inputs: Any = getattr(module, "input_quantizer", None)
    extra = EXTRA_OF_METHOD.get(method, "")
    if not extra and hasattr(inputs, "_pre_quant_scale"):
        extra = PRE_QUANT_SCALE
    if hasattr(quantizer, "svdquant_lora_a"):
        extra = LOW_RANK
    has_inputs = inputs is not None and inputs.is_enabled
    of_input = _number_format(inputs, is_input=True) if has_inputs else ""
    return Linear(_number_format(quantizer), of_input, extra)


def _kv_format(model: torch.nn.Module) -> tuple[str, bool]:
    """How keys and values are quantized, and whether attention's products are too."""
    found, attention = set(), False
    for name, quantizer in enabled(model):
        kind = name.rpartition(".")[2]
        if kind in ("k_bmm_quantizer", "v_bmm_quantizer"):
            form = _number_format(quantizer)
            form += "_affine" if quantizer.bias else ""
            form += "_rotate" if quantizer.rotate_is_enabled else ""
            found.add(form)
        elif kind in ("q_bmm_quantizer", "p_bmm_quantizer", "softmax_quantizer"):
            attention = True
    # Rotation is on the keys alone.
    form = "nvfp4_rotate" if "nvfp4_rotate" in found else "+".join(sorted(found))
    return form or NO_KV_CACHE, attention


def kernel_refusal(
    name: str, form: Linear, outputs: int, inputs: int, target: str, parts: Sequence[int] = ()
) -> str:
    """Why an engine's kernel does not take a layer; empty if it does.

    Args:
        name: of its module; the kernels of experts are others.
        target: the engine, by its name in ``--target``.
        parts: outputs of each matrix that the layer holds, where they are known.
    """
    algorithm = exportable.judge([form], target=target).quant_algo
    of_experts = ".local_experts." in name
    own = f"experts' {name.rpartition('.')[2]}" if of_experts else name.rpartition(".")[2]
    support = engines.TARGETS[target].algorithms.get(algorithm)
    sizes = parts if parts and support and support.separate else (outputs,)
    refused = (
        kernels.refusal(name, own, algorithm, size, inputs, target=target, of_experts=of_experts)
        for size in sizes
    )
    return next(filter(None, refused), "")


def _refusal(name: str, module: Any, form: Linear, target: str) -> str:
    """:func:`kernel_refusal` of a layer of the model."""
    outputs, inputs = whole_sizes(module)
    parts: list[int] = []
    if module._parameters.get("weight") is not None:  # a tied output layer has none
        rows = [len(part) for part in fused_rows.matrices(name, module)]
        parts = [count * outputs // sum(rows) for count in rows]
    return kernel_refusal(name, form, outputs, inputs, target, parts)


def whole_sizes(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer over all tensor-parallel ranks.

    megatron-core's layers say them; of others this rank's divide them.
    """
    if hasattr(module, "output_size"):
        return module.output_size, module.input_size
    # A packed weight has another shape.
    weight: Any = module._parameters["weight"]
    rows, columns = getattr(weight, "metadata", {}).get("shape", weight.shape)
    return rows, columns


def judge_model(
    model: torch.nn.Module,
    method: str = "",
    *,
    required: bool = False,
    target: str = engines.DEFAULT,
) -> Verdict:
    """What the model can be exported as; the same on all ranks, a collective call.

    Args:
        method: of the calibration that is still to come.
        required: raise UsageError if it cannot be exported.
        target: the engine, by its name in ``--target``.
    """
    forms = {name: linear_of(module, method) for name, module in model.named_modules()}
    linears = [form for form in forms.values() if form]
    refused = (
        _refusal(name, model.get_submodule(name), form, target)
        for name, form in forms.items()
        if form
    )
    tied = getattr(model, "share_embeddings_and_output_weights", False)
    output = getattr(model, "output_layer", None) if tied else None
    tied_output = output is not None and linear_of(output) is not None
    unread = next(filter(None, refused), "")
    experts = any(layer_names.is_expert(f"{name}.") for name, form in forms.items() if form)
    gathered = from_all_ranks((linears, *_kv_format(model), tied_output, unread, experts))
    if any(each[3] for each in gathered):
        found = Verdict(reason="the output layer is quantized, and the embedding shares its weight")
    else:
        found = exportable.judge(
            [linear for each in gathered for linear in each[0]],
            next((each[1] for each in gathered if each[1] != NO_KV_CACHE), NO_KV_CACHE),
            attention=any(each[2] for each in gathered),
            target=target,
        )
        if any(each[5] for each in gathered):  # a mixture may be read without them alone
            unread = engines.experts_refusal(found.quant_algo, target)
        unread = next((each[4] for each in gathered if each[4]), unread)
        found = Verdict(reason=unread) if found.exportable and unread else found
    if required and not found.exportable:
        raise exportable.unexportable("the quantized model", found)
    return found


def require_savable(model: torch.nn.Module, *, packed: bool) -> None:
    """Raise UsageError, before calibration, for scales that ModelOpt cannot save at TP > 1."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    used = {linear.weight for linear in map(linear_of, model.modules()) if linear}
    static = [row.name for row in formats.WEIGHTS.values() if row.stored_block_scales]
    mine = sorted(used.intersection(static))
    if size > 1 and any(from_all_ranks(mine)):
        raise exportable.unsavable(", ".join(mine) or "stored block scales", size)
    twice = [row.name for row in formats.WEIGHTS.values() if row.parts]
    if packed and any(from_all_ranks(sorted(used.intersection(twice)))):
        raise exportable.packed_twice("the quantized model")
    by_rank = sorted(filter(formats.packs_by_rank, used))
    if size > 1 and packed and any(from_all_ranks(by_rank)):
        raise exportable.unpackable(", ".join(by_rank) or "a scale a row", size)


def is_linear(module: torch.nn.Module) -> bool:
    """Whether the module multiplies by a weight of its own."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim == 2 and "Embedding" not in type(module).__name__
