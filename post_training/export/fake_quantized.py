"""Weights and scales as the fake-quantized model computes with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from modelopt.torch.quantization.extensions import get_cuda_ext_fp8
from modelopt.torch.quantization.nn import SequentialQuantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor, QTensorWrapper

from post_training.quantization import quantizers
from post_training.quantization.formats.registry import number_format


def unpack(model: torch.nn.Module) -> None:
    """Replace packed weights (``--compress``) by weights in 16 bits that quantize to their codes.

    For the exporter, which splits fused weights and packs the parts.
    """
    for module in model.modules():
        packed: Any = module._parameters.get("weight")
        quantizer: Any = getattr(module, "weight_quantizer", None)
        if isinstance(packed, QTensorWrapper) and quantizer is not None:
            weight = quantizer.dequantize(packed)
            quantizer._fake_quant, quantizer._dequantize = True, False
            parameter = torch.nn.Parameter(weight, requires_grad=False)
            # ModelOpt's own dictionary of parameters would pack it again.
            dict.__setitem__(module._parameters, "weight", parameter)


def fake_quantized(module: Any) -> torch.Tensor:
    """The module's weight as its forward pass uses it, in float32: what an exact export
    dequantizes to."""
    weight = module.weight.detach()
    quantizer = getattr(module, "weight_quantizer", None)
    if quantizer is None:
        return weight.float()
    with torch.no_grad(), _without_compiling():
        return quantizer(weight).detach().float()


@contextlib.contextmanager
def _without_compiling() -> Iterator[None]:
    """In the block FP8 is rounded by PyTorch unless ModelOpt's kernel is loaded already.

    By their sources (tensor_quant_gpu_fp8.cu, ``_fp8_eager``) both compute the same bits. To round
    each weight once, as an export does, takes seconds, and to compile the kernel a minute.
    """
    if hasattr(get_cuda_ext_fp8, "extension"):
        yield
        return
    get_cuda_ext_fp8.extension = None  # as after a failure to compile
    try:
        yield
    finally:
        del get_cuda_ext_fp8.extension


def as_computed(module: Any) -> torch.Tensor:
    """The same, but a matrix that is not quantized in its own dtype: it may be an embedding."""
    quantizer = getattr(module, "weight_quantizer", None)
    is_quantized = quantizer is not None and quantizer.is_enabled
    is_matrix = module.weight.dim() == 2
    return module.weight.detach() if is_matrix and not is_quantized else fake_quantized(module)


def step_of_each(module: Any) -> torch.Tensor:
    """The distance between two codes of each weight, float32 [out, in]; 0 where it has none.

    For integers with a stored maximum of each output channel, or of each block of a row (before
    they are rounded again, to FP8), and for MXFP4, whose step is here the power of two that the
    numbers are multiplied by.
    """
    weight = module.weight.detach()
    quantizer = getattr(module, "weight_quantizer", None)
    if quantizer is None or not quantizer.is_enabled:
        return torch.zeros((), dtype=torch.float32, device=weight.device).expand(weight.shape)
    rows, columns = weight.shape
    if isinstance(quantizer, SequentialQuantizer):
        quantizer = quantizer[0]
    if quantizer.is_mx_format:
        blocks = fake_quantized(module).unflatten(1, (-1, quantizer.block_sizes[-1]))
        _, exponent = torch.frexp(blocks.abs().amax(-1))
        # The largest of a block becomes 4 or 6; nothing is smaller than the smallest power.
        powers = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent - 3)
        powers = powers.clamp_min(torch.finfo(torch.float32).tiny)
        return powers.repeat_interleave(quantizer.block_sizes[-1], dim=1)
    steps = quantizers.scale_of(quantizer.amax.detach(), quantizer).reshape(rows, -1)
    return steps.repeat_interleave(columns // steps.shape[1], dim=1)


def nvfp4_block_scales(
    quantizer: Any,
    weight: torch.Tensor,
    from_unrounded: torch.Tensor,
    tensor_scale: torch.Tensor,
) -> torch.Tensor:
    """The E4M3 scale of each block with which ``weight`` lies on E2M1 codes.

    A block's maximum over six times the tensor's scale may fall on a tie between two E4M3 codes:
    the kernel that computed the fake quantization, whose division is not correctly rounded, and
    the packer then decide differently. The fake-quantized block tells which one it was, since its
    maximum is six times its scale; except for scales in E4M3's subnormal range, whose rounding is
    coarser than the step from 4 to 6, and there the unrounded weight is right.

    Args:
        quantizer: the weight's.
        weight: fake-quantized, float32 [out, in].
        from_unrounded: E4M3 [out, in / 16], computed from the weight before quantization.
        tensor_scale: float32 scalar.
    """
    from_rounded, _ = NVFP4QTensor.get_weights_scaling_factor_from_quantizer(
        quantizer, weight, tensor_scale
    )

    def error(scales: torch.Tensor) -> torch.Tensor:
        block = weight.unflatten(-1, (scales.shape[-1], -1))
        step = (scales.float() * tensor_scale.to(weight.device)).unsqueeze(-1)
        scaled = (block / step).abs_()
        codes = torch.bucketize(scaled, NVFP4QTensor.get_e2m1_bounds(weight.device))
        nearest = NVFP4QTensor.get_e2m1_values(weight.device)[codes]
        return ((nearest - scaled).abs_() * step).amax(-1)

    better = error(from_rounded) < error(from_unrounded)
    # float8 has no torch.where: its bytes are chosen.
    return torch.where(
        better, from_rounded.view(torch.uint8), from_unrounded.view(torch.uint8)
    ).view(torch.float8_e4m3fn)


def calibrated_scale(quantizer: Any) -> torch.Tensor | None:
    """The scale of an input, or of keys or values, that follows from its calibrated maximum.

    None where nothing was calibrated: off, dynamic, or in blocks with a power of two (MX).
    """
    amax = getattr(quantizer, "amax", None)
    if amax is None or not quantizer.is_enabled or amax.numel() != 1:
        return None
    found = number_format(quantizer)
    if found is None or found.largest is None:
        return None
    return amax.detach().float().reshape(()) / found.largest
