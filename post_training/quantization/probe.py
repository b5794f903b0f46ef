"""The quantizers of a model, and the number formats they round to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

from post_training.quantization import formats
from post_training.quantization.formats import Linear
from post_training.quantization.formats.base import (
    EXTRA_OF_METHOD,
    LOW_RANK,
    PRE_QUANT_SCALE,
    block_sizes,
)


def enabled(model: torch.nn.Module) -> Iterator[tuple[str, TensorQuantizer]]:
    """Name and quantizer of each that is enabled."""
    for name, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            yield name, module


def names(model: torch.nn.Module) -> list[str]:
    """Names of all quantizers, the disabled ones included."""
    kinds = (TensorQuantizer, SequentialQuantizer)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def needs_amax(quantizer: TensorQuantizer) -> bool:
    """Whether the quantizer computes with a stored maximum.

    Microscaling formats take a power of two from each block, dynamic ones look at each input, and
    some recipes fix the constant.
    """
    is_dynamic = quantizer.is_mx_format or getattr(quantizer, "_dynamic", False)
    return not (is_dynamic or getattr(quantizer, "_use_constant_amax", False))


def weight_format(quantizer: Any) -> str:
    """Name of the number format of a weight's quantizer, or a description if none matches."""
    if isinstance(quantizer, SequentialQuantizer):
        parts = tuple(weight_format(each) for each in quantizer)
        return next(
            (row.name for row in formats.WEIGHTS.values() if row.parts == parts), "+".join(parts)
        )
    found = formats.number_format(quantizer)
    return found.name if found else _description(quantizer)


def input_format(quantizer: Any) -> str:
    """The same for the quantizer of an input; empty if it is off."""
    if quantizer is None or not quantizer.is_enabled:
        return ""
    found = formats.number_format(quantizer, is_input=True)
    return found.name if found else _description(quantizer)


def _description(quantizer: Any) -> str:
    bits, axis = quantizer.num_bits, quantizer.axis
    return f"{bits} bits with blocks {block_sizes(quantizer)} and axis {axis}"


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
    return Linear(weight_format(quantizer), input_format(inputs), extra)


def kv_format(model: torch.nn.Module) -> tuple[str, bool]:
    """How keys and values are quantized (or empty), and whether attention's products are too."""
    found, attention = set(), False
    for name, quantizer in enabled(model):
        kind = name.rpartition(".")[2]
        if kind in ("k_bmm_quantizer", "v_bmm_quantizer"):
            form = weight_format(quantizer)
            form += "_affine" if quantizer.bias else ""
            form += "_rotate" if quantizer.rotate_is_enabled else ""
            found.add(form)
        elif kind in ("q_bmm_quantizer", "p_bmm_quantizer", "softmax_quantizer"):
            attention = True
    # Rotation is on the keys alone.
    form = "nvfp4_rotate" if "nvfp4_rotate" in found else "+".join(sorted(found))
    return form, attention
