"""Scales of weights that an engine stores in fewer bits, rounded before the model is scored."""

from __future__ import annotations

from typing import Any

import torch

from post_training.quantization import quantizers
from post_training.quantization.formats import registry as formats

_LARGEST = 448.0  # of E4M3
# vLLM's kernel takes no smaller scale of a row, and stores an eighth of the codes.
_SMALLEST_ROW = 1 / (_LARGEST * 512)
_CODES = 8.0
_LEAST_HALF = 2.0**-24  # above zero


@torch.no_grad()
def round_scales(model: torch.nn.Module) -> None:
    """Make the scales of weights numbers that engines read; a collective call.

    They read those of integers in bfloat16. vLLM's kernel for INT4 weights with FP8 inputs makes
    them E4M3 numbers times one of the row: then they are such numbers, and of bfloat16 too.
    TensorRT-LLM's divides them by one of the whole matrix, in half precision. What is scored from
    here on is what is exported.
    """
    for module in model.modules():
        form = quantizers.linear_of(module)
        found = formats.WEIGHTS.get(form.weight) if form else None
        if form is None or found is None or not found.bf16_scales:
            continue
        quantizer: Any = module.weight_quantizer
        if found.parts:
            blocks, matrix = quantizer
            _round_both(blocks, matrix, module)
            continue
        scale = quantizers.scale_of(quantizer._amax, quantizer)
        if form.input == "fp8_token":
            weight: Any = module._parameters["weight"]
            scale = _for_fp8(scale.view(weight.shape[0], -1), module).view_as(scale)
        scale = scale.bfloat16().float()
        quantizer._amax = scale * quantizer.maxbound  # float32, which holds the product


def _for_fp8(scale: torch.Tensor, module: Any) -> torch.Tensor:
    """E4M3 numbers times one of the row, whose largest is 448 times it, [rows, groups].

    The row's has four significant bits, as E4M3 has: bfloat16 holds the products.
    """
    largest = _over_ranks(scale.amax(1, keepdim=True), module, dimensions=(1,))
    mantissa, exponent = torch.frexp(largest / _LARGEST)
    row = torch.ldexp(torch.round(mantissa * 16) / 16, exponent)
    exact = row >= _SMALLEST_ROW
    row = row.clamp_min(_SMALLEST_ROW)
    codes = (scale / row / _CODES).clamp(2.0**-9, _LARGEST / _CODES).to(torch.float8_e4m3fn)
    codes = torch.where(exact & (scale == largest), _LARGEST, codes.float() * _CODES)
    return codes * row


def _round_both(blocks: Any, matrix: Any, module: Any) -> None:
    """Of INT4 whose products with the scales of blocks are FP8 numbers times the matrix's scale.

    The matrix's is a power of two, so that dividing by it is exact. A block's has five significant
    bits: its products with codes have eight, which bfloat16 and half precision hold.
    """
    scale = quantizers.scale_of(blocks._amax, blocks)
    weight = module._parameters["weight"].detach()
    used = weight.reshape(scale.numel(), -1).any(1)  # others have a scale of one
    used = used.view_as(scale)
    largest = _over_ranks((scale * used).max(), module, dimensions=(0, 1))
    scale = torch.where(used, scale, largest)
    # The lowest code is one below the largest one's negative.
    _, exponent = torch.frexp((blocks.maxbound + 1) * largest / _LARGEST)
    whole = torch.ldexp(torch.ones_like(largest), exponent)
    scale = _in_half(_in_half(scale / whole) * whole)
    mantissa, exponent = torch.frexp(scale)
    blocks._amax = torch.ldexp(torch.round(mantissa * 32) / 32, exponent) * blocks.maxbound
    matrix._amax = whole * _LARGEST


def _in_half(values: torch.Tensor) -> torch.Tensor:
    """The nearest numbers of half precision that are not zero."""
    return values.clamp_min(_LEAST_HALF).half().float()


def _over_ranks(largest: torch.Tensor, module: Any, dimensions: tuple[int, ...]) -> torch.Tensor:
    """The maximum over the tensor-parallel ranks of a weight that is split along one of these."""
    weight = module._parameters["weight"]
    split = getattr(weight, "tensor_model_parallel", False) and weight.partition_dim in dimensions
    if split and module.tp_group.size() > 1:
        torch.distributed.all_reduce(
            largest, op=torch.distributed.ReduceOp.MAX, group=module.tp_group
        )
    return largest
