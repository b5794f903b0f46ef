"""ModelOpt's block quantization without its CUDA and Triton kernels.

Covers what :mod:`modelopt.torch.quantization.tensor_quant` sends to those kernels:

- dynamic blocks (NVFP4, MXFP8, MXFP6, MXFP4, MXINT8): the operator
  ``tensorrt::dynamic_block_quantize_op`` (:229) gets an implementation for CPU tensors; the one for
  CUDA tensors is left alone;
- static NVFP4 blocks (:592) and the plain cast to FP4 (:662): the two Triton functions get a
  counterpart for CPU tensors.

``replace_function`` (utils/core_utils.py:383), with which quantized layers call the plain ones,
puts the function back after an error too: a pass that ran out of memory can be repeated.

Fake quantization agrees with the values that ModelOpt's packers (``NVFP4QTensor``,
``MXFP8QTensor``) store, with the kernels' own exceptions: NVFP4 blocks whose scale is below 1e-5,
or rounds to zero in E4M3, become zero (the packer keeps the smallest scale instead); MXFP4 ties go
to the even code (the packer: towards zero).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

from post_training.common.quiet import quiet
from post_training.portable import imports
from post_training.portable.formats import ELEMENT_FORMATS, ElementFormat, power_of_two_scale

E8M0 = (8, 0)
NVFP4 = ((2, 1), (4, 3))
E4M3_MAX = ELEMENT_FORMATS[4, 3].largest
E2M1_MAX = ELEMENT_FORMATS[2, 1].largest
# Below this the kernel takes a block for zeros.
SMALLEST_NVFP4_SCALE = 1e-5

# The registration ends with the object.
_library: torch.library.Library | None = None


def dynamic_block_quantize(
    inputs: torch.Tensor,
    block_size: int,
    amax: torch.Tensor | None,
    num_bits: int,
    exponent_bits: int,
    scale_num_bits: int,
    scale_exponent_bits: int,
) -> torch.Tensor:
    """Round ``inputs`` to a block format and back, with scales found here.

    Args:
        inputs: [..., n]; blocks of ``block_size`` lie along the last dimension, the last one may
            be short.
        amax: largest magnitude of the whole tensor, for formats with two levels of scales; its
            largest entry counts. None for formats with power-of-two scales.
        num_bits, exponent_bits: of an element, sign included; 0 exponent bits mean an integer.
        scale_num_bits, scale_exponent_bits: the same for a block's scale.

    Returns:
        The result in the shape and type of ``inputs``; computed in float32.

    Raises:
        NotImplementedError: for a format that ModelOpt has no kernel for either.
        ValueError: if a format with two levels of scales comes without ``amax``.
    """
    element_bits = _bits(num_bits, exponent_bits)
    scale_bits = _bits(scale_num_bits, scale_exponent_bits)
    if element_bits not in ELEMENT_FORMATS or (
        scale_bits not in ELEMENT_FORMATS and scale_bits != E8M0
    ):
        raise NotImplementedError(
            f"dynamic block quantization with num_bits={element_bits} and scale_bits={scale_bits}"
        )
    element = ELEMENT_FORMATS[element_bits]
    blocks = _blocks(inputs.float(), block_size)
    block_amax = blocks.abs().amax(dim=-1, keepdim=True)
    if scale_bits == E8M0:
        scale = power_of_two_scale(block_amax, element)
    else:
        if amax is None:
            raise ValueError(
                f"{element.name} with {ELEMENT_FORMATS[scale_bits].name} scales needs amax"
            )
        tensor_amax = amax.float().amax()
        if (element_bits, scale_bits) == NVFP4:
            scale = _nvfp4_scale(block_amax, tensor_amax)
        else:
            scale = _two_level_scale(block_amax, tensor_amax, element, ELEMENT_FORMATS[scale_bits])
    return _unblocked(element.round(blocks / scale) * scale, inputs)


def static_blockwise_fp4_fake_quant(
    x: torch.Tensor,
    amax: torch.Tensor,
    global_amax: torch.Tensor | None = None,
    quantize_block_scales: bool = True,
    fp8_max_for_normalization: float = E4M3_MAX,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Round ``x`` to NVFP4 and back with given maxima of its blocks.

    Args:
        x: consecutive values form a block; any shape.
        amax: one per block, any shape; their number gives the size of the blocks.
        global_amax: of the whole tensor; the largest of ``amax`` by default.
        quantize_block_scales: whether scales are rounded to E4M3.
        fp8_max_for_normalization: the E4M3 value that the largest scale becomes.
        out_dtype: of the result; that of ``x`` by default.

    Raises:
        ValueError: if the values do not fill the blocks.
    """
    count = amax.numel()
    if count == 0 or x.numel() % count:
        raise ValueError(f"{x.numel()} values do not fill {count} blocks of one size")
    scale = amax.float().reshape(-1, 1) / E2M1_MAX
    if quantize_block_scales:
        from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl

        whole = amax.float().amax() if global_amax is None else global_amax.float()
        largest = whole * (E4M3_MAX / fp8_max_for_normalization) / E2M1_MAX
        scale = scaled_e4m3_impl(scale, largest)
    divisor = torch.where((scale != 0) & torch.isfinite(scale), scale, 1.0)
    rounded = ELEMENT_FORMATS[2, 1].round(x.float().reshape(count, -1) / divisor) * divisor
    return torch.where(scale == 0, 0.0, rounded).reshape(x.shape).to(out_dtype or x.dtype)


def static_blockwise_fp4_cast(
    x: torch.Tensor, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Round values that are scaled already to E2M1."""
    return ELEMENT_FORMATS[2, 1].round(x.float()).to(out_dtype or x.dtype)


def install() -> None:
    """Arrange for the implementations to be registered when ModelOpt is imported."""
    imports.on_import("modelopt.torch.quantization.tensor_quant", _change_tensor_quant)
    imports.on_import("modelopt.torch.quantization.utils.core_utils", _change_core_utils)


@contextlib.contextmanager
def replace_function(
    package: Any, name: str, new_func: Any, og_func_cache_name: str | None = None
) -> Iterator[None]:
    """In the block ``package`` has another function; its own is there under a further name."""
    kept, own = og_func_cache_name or f"_{name}", getattr(package, name)
    setattr(package, name, new_func)
    setattr(package, kept, own)
    try:
        yield
    finally:
        setattr(package, name, own)
        delattr(package, kept)


def _change_core_utils(module: ModuleType) -> None:
    vars(module)["replace_function"] = replace_function


def _bits(total: int, exponent: int) -> Any:
    return (exponent, total - exponent - 1) if exponent else total


def _blocks(values: torch.Tensor, size: int) -> torch.Tensor:
    """[..., n] to [..., blocks, size], padded with zeros."""
    missing = -values.shape[-1] % size
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.unflatten(-1, (-1, size))


def _unblocked(blocks: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return blocks.flatten(-2)[..., : like.shape[-1]].to(like.dtype)


def _nvfp4_scale(block_amax: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    """As the Triton kernel ``fp4_fake_quant_block``: E4M3 block scales times one float32 scale."""
    whole = amax / (E2M1_MAX * E4M3_MAX)
    whole = torch.where(whole > 0, whole, 1e-12)
    scale = ELEMENT_FORMATS[4, 3].round(block_amax / (E2M1_MAX * whole)) * whole
    return torch.where(scale >= SMALLEST_NVFP4_SCALE, scale, 1.0)


def _two_level_scale(
    block_amax: torch.Tensor,
    amax: torch.Tensor,
    element: ElementFormat,
    scale_format: ElementFormat,
) -> torch.Tensor:
    """As the CUDA function ``compute_scale_with_global``, whose middle part is in float64."""
    usable = (block_amax > 0) & torch.isfinite(block_amax) & (amax > 0) & torch.isfinite(amax)
    whole = scale_format.largest * (element.largest / amax).double()
    stored = scale_format.round(((block_amax / element.largest) * whole).float()).double()
    # A scale that rounds to zero stands for a block of zeros; 1 rounds such values to zero too.
    return torch.where(usable & (stored > 0), (stored / whole).float(), 1.0)


class _Kernels(ModuleType):
    """ModelOpt's Triton functions as seen by ``tensor_quant``, with counterparts for the CPU."""

    IS_AVAILABLE = True

    def __init__(self, kernels: ModuleType) -> None:
        super().__init__(kernels.__name__)
        self._kernels = kernels
        for counterpart in (static_blockwise_fp4_fake_quant, static_blockwise_fp4_cast):
            setattr(self, counterpart.__name__, self._by_device(counterpart))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernels, name)

    def _by_device(self, counterpart: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if x.is_cuda and self._kernels.IS_AVAILABLE:
                return getattr(self._kernels, counterpart.__name__)(x, *args, **kwargs)
            return counterpart(x, *args, **kwargs)

        return call


def _change_tensor_quant(module: ModuleType) -> None:
    """Register the implementations with ``modelopt.torch.quantization.tensor_quant``."""
    global _library
    _library = torch.library.Library("tensorrt", "IMPL")
    # torch reports that ModelOpt's own registration, which needs CUDA, is overridden.
    with quiet(warning="(?s).*Overriding a previously registered kernel"):
        _library.impl(
            "dynamic_block_quantize_op", dynamic_block_quantize, "CPU", allow_override=True
        )
    vars(module)["triton_kernel"] = _Kernels(module.triton_kernel)
