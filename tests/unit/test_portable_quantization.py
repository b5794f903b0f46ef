"""The reference of ModelOpt's block quantization: formats, ties, packers, gradients."""

from __future__ import annotations

import portable_helpers as helpers
import pytest
import torch
from modelopt.torch.quantization import tensor_quant
from modelopt.torch.quantization.qtensor import MXFP8QTensor, NVFP4QTensor

from post_training.portable import formats
from post_training.portable.quantization import dynamic_block_quantize

# The kernels of a GPU, which run there, are compiled with fast division: the reference is what is
# tested here, so tensors stay on the CPU. The comparison of both is the last test.
NVFP4 = {"num_bits": (2, 1), "scale_bits": (4, 3), "block_size": 16}
DTYPES = [torch.float32, torch.bfloat16]


def values(dtype: torch.dtype = torch.float32, rows: int = 256, columns: int = 512) -> torch.Tensor:
    """Rows whose magnitudes differ by orders."""
    spread = helpers.random(rows, 1, seed=1).exp()
    return (helpers.random(rows, columns) * spread).to("cpu", dtype)


def fake(x: torch.Tensor, num_bits, scale_bits, block_size, amax=None) -> torch.Tensor:
    return tensor_quant.dynamic_block_quant(x, block_size, amax, None, num_bits, scale_bits)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nvfp4_gives_the_values_that_the_packer_stores(dtype):
    x = values(dtype)
    packed, scale, double_scale = NVFP4QTensor.quantize(x.clone(), 16)
    stored = packed.dequantize(
        dtype=dtype, scale=scale, double_scale=double_scale, block_sizes={-1: 16}
    )
    found = fake(x, **NVFP4, amax=x.abs().amax())
    assert found.dtype == dtype
    assert torch.equal(found, stored)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp8_gives_the_values_that_the_packer_stores(dtype):
    x = values(dtype)
    packed, scale = MXFP8QTensor.quantize(x.clone())
    assert torch.equal(fake(x, (4, 3), (8, 0), 32), packed.dequantize(scale=scale))


def test_static_nvfp4_blocks_with_their_own_maxima_equal_dynamic_ones():
    x = values()
    amax = x.unflatten(-1, (-1, 16)).abs().amax(-1)
    static = tensor_quant.static_blockwise_fp4_fake_quant(x, amax, x.abs().amax())
    # Both compute the scales in float32 but in another order: one unit in the last place.
    torch.testing.assert_close(static, fake(x, **NVFP4, amax=x.abs().amax()), rtol=1e-6, atol=0)


def test_static_nvfp4_clips_at_the_given_maximum():
    x = torch.tensor([[1.0, 2.0, 3.0, 30.0] + [0.0] * 12])
    found = tensor_quant.static_blockwise_fp4_fake_quant(x, torch.tensor([6.0]))
    assert found[0, :4].tolist() == [1.0, 2.0, 3.0, 6.0]


def floats(exponent: int, mantissa: int, bias: int) -> list[float]:
    """All magnitudes of a format: subnormal numbers, then 2**(e - bias) * (1 + m / steps)."""
    steps = 2**mantissa
    subnormal = [2.0 ** (1 - bias) * m / steps for m in range(steps)]
    normal = [
        2.0 ** (e - bias) * (1 + m / steps) for e in range(1, 2**exponent) for m in range(steps)
    ]
    return subnormal + normal


MAGNITUDES = {
    (2, 1): [0, 0.5, 1, 1.5, 2, 3, 4, 6],
    (3, 2): floats(3, 2, bias=3),
    (2, 3): floats(2, 3, bias=1),
    (1, 2): [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5],
    (0, 3): [0, 1, 2, 3, 4, 5, 6, 7],
    (3, 0): [0, 0.25, 0.5, 1, 2, 4, 8, 16],
    8: list(range(128)),
}


@pytest.mark.parametrize("bits", MAGNITUDES)
def test_ties_go_to_the_even_code_and_large_values_saturate(bits):
    form = formats.ELEMENT_FORMATS[bits]
    grid = torch.tensor(MAGNITUDES[bits], dtype=torch.float32)
    assert form.largest == grid[-1]
    assert torch.equal(form.round(grid), grid)
    ties = (grid[1:] + grid[:-1]) / 2
    up = torch.arange(1, len(grid))
    nearest = up if bits == (3, 0) else torch.where(up % 2 == 0, up, up - 1)
    assert torch.equal(form.round(ties), grid[nearest])
    assert torch.equal(form.round(-ties), -grid[nearest])
    just_above = torch.nextafter(ties, torch.tensor(torch.inf))
    just_below = torch.nextafter(ties, torch.tensor(0.0))
    assert torch.equal(form.round(just_above), grid[1:])
    assert torch.equal(form.round(just_below), grid[:-1])
    beyond = torch.tensor([1e9, -1e9, torch.inf])
    assert form.round(beyond).tolist() == [form.largest, -form.largest, form.largest]


def test_fp4_cast_rounds_without_a_scale():
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -5.0, 7.0])
    assert tensor_quant.fp4_cast_ste(x).tolist() == [0, 1, 1, 2, 2, 4, 4, -4, 6]


@pytest.mark.parametrize("bits", [(4, 3), (5, 2), (3, 2), (2, 3), (2, 1), 8])
def test_power_of_two_scales_reach_the_format_but_never_clip(bits):
    largest = formats.ELEMENT_FORMATS[bits].largest
    amax = torch.tensor([largest, largest * 1.0001, largest * 0.5001, largest * 2**-20, 0.0])
    scale = formats.power_of_two_scale(amax, formats.ELEMENT_FORMATS[bits])
    assert scale.tolist() == [1.0, 2.0, 1.0, 2.0**-20, 1.0]


def test_microscaling_error_falls_with_the_number_of_bits():
    x = values()
    errors = [
        (fake(x, bits, (8, 0), 32) - x).norm() / x.norm() for bits in ((2, 1), (3, 2), (2, 3), 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.2
    assert errors[-1] < 0.01


def test_short_last_blocks_are_scaled_by_what_they_hold():
    x = values(columns=40)
    whole = fake(x, (4, 3), (8, 0), 32)
    assert torch.equal(whole[:, 32:], fake(x[:, 32:], (4, 3), (8, 0), 32))


def test_nvfp4_blocks_too_small_for_a_scale_become_zero():
    x = values()
    x[0, :16] = 1e-6
    found = fake(x, **NVFP4, amax=x.abs().amax())
    assert found[0, :16].count_nonzero() == 0


def test_gradients_pass_straight_through():
    x = values().requires_grad_()
    fake(x, **NVFP4, amax=x.detach().abs().amax()).backward(torch.ones_like(x))
    assert torch.equal(x.grad, torch.ones_like(x))


def test_unknown_formats_and_missing_maxima_are_errors():
    x = values()
    with pytest.raises(NotImplementedError, match="num_bits=5"):
        dynamic_block_quantize(x, 16, None, 5, 0, 8, 8)
    with pytest.raises(ValueError, match="needs amax"):
        dynamic_block_quantize(x, 16, None, 4, 2, 8, 4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compares with the kernels of a GPU")
@pytest.mark.parametrize(
    ("num_bits", "scale_bits", "block_size"),
    [((2, 1), (4, 3), 16), ((2, 1), (8, 0), 32), ((4, 3), (8, 0), 32), ((3, 2), (8, 0), 32)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gpu_kernels_equal_the_reference_but_for_ties(num_bits, scale_bits, block_size, dtype):
    x = values(dtype)
    amax = x.abs().amax() if scale_bits == (4, 3) else None
    on_gpu = amax.cuda() if amax is not None else None
    kernel = fake(x.cuda(), num_bits, scale_bits, block_size, on_gpu).cpu()
    # CUDA's and Triton's fast division is right to two units in the last place, 2**-22: a quotient
    # that close to a tie, a block's scale or a value, may go to either side. Nothing else may.
    element, nudges = formats.ELEMENT_FORMATS[num_bits], (1 - 2**-22, 1 + 2**-22)
    blocks = x.float().unflatten(-1, (-1, block_size))
    block_amax = blocks.abs().amax(-1, keepdim=True)
    if scale_bits == (8, 0):
        scales = [formats.power_of_two_scale(block_amax, element)]
    else:
        whole = amax.float() / (6 * 448)
        quotient = block_amax / (6 * whole)
        scales = [
            formats.ELEMENT_FORMATS[scale_bits].round(quotient * nudge) * whole for nudge in nudges
        ]
        scales = [torch.where(scale >= 1e-5, scale, 1.0) for scale in scales]
    allowed = torch.stack(
        [element.round(blocks / scale * nudge) * scale for scale in scales for nudge in nudges]
    )
    kernel_blocks = kernel.unflatten(-1, (-1, block_size))
    assert (allowed.to(dtype) == kernel_blocks).any(0).all()
    # And ties are rare: float32 values hardly meet one, bfloat16 has few values.
    assert (fake(x, num_bits, scale_bits, block_size, amax) != kernel).float().mean() < 1e-2
