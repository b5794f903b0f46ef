"""Packing weights into their low-bit form (``--compress``), to the codes that were calibrated."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from megatron.core.transformer import MegatronModule
from modelopt.torch.quantization.qtensor import INT8QTensor

from post_training.common.quiet import quiet
from post_training.quantization import quantizers
from post_training.quantization.formats import registry as formats


def pack(model: MegatronModule) -> None:
    """Pack the quantized weights of ``model``, in place.

    ModelOpt finds the scales of integers anew and divides by them in the weights' dtype: in bf16
    every tenth code of INT8 came out as its neighbor. From weights that lie on codes, divided in
    float32, it finds the calibrated ones; and codes of FP8, which are farther apart than bf16's
    rounding, however they are divided.
    """
    with torch.no_grad():
        for module in model.modules():
            form = quantizers.linear_of(module)
            if form and formats.packs_rounded(form.weight):
                weight: Any = module.weight
                weight.copy_(module.weight_quantizer(weight))
    with quiet(stdout=True), _dividing_in_float32():
        mtq.compress(model)


@contextlib.contextmanager
def _dividing_in_float32() -> Iterator[None]:
    original = INT8QTensor.quantize

    def quantize(weight: torch.Tensor, **options: Any) -> tuple[Any, torch.Tensor]:
        _, scales = original(weight.float(), **options)
        scales = scales.to(weight.dtype)
        packed, _ = original(weight.float(), scales=scales.float(), **options)
        packed.metadata["dtype"] = weight.dtype
        return packed, scales

    INT8QTensor.quantize = staticmethod(quantize)
    try:
        yield
    finally:
        INT8QTensor.quantize = original
