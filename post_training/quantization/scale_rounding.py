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


@torch.no_grad()
def round_scales(model: torch.nn.Module) -> None:
    """Make the scales of weights numbers that engines read; a collective call.

    They read those of integers in bfloat16. vLLM's kernel for INT4 weights with FP8 inputs makes
    them E4M3 numbers times one of the row: then they are such numbers, and of bfloat16 too. What is
    scored from here on is what is exported.
    """
    for module in model.modules():
        form = quantizers.linear_of(module)
        found = formats.WEIGHTS.get(form.weight) if form else None
        if form is None or found is None or not found.bf16_scales:
            continue
        quantizer: Any = module.weight_quantizer
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
    largest = scale.amax(1, keepdim=True)
    weight = module._parameters["weight"]
    split = getattr(weight, "tensor_model_parallel", False) and weight.partition_dim == 1
    if split and module.tp_group.size() > 1:
        torch.distributed.all_reduce(
            largest, op=torch.distributed.ReduceOp.MAX, group=module.tp_group
        )
    mantissa, exponent = torch.frexp(largest / _LARGEST)
    row = torch.ldexp(torch.round(mantissa * 16) / 16, exponent)
    exact = row >= _SMALLEST_ROW
    row = row.clamp_min(_SMALLEST_ROW)
    codes = (scale / row / _CODES).clamp(2.0**-9, _LARGEST / _CODES).to(torch.float8_e4m3fn)
    codes = torch.where(exact & (scale == largest), _LARGEST, codes.float() * _CODES)
    return codes * row
