"""Attention over the steps of training-time test: the fused kernels' way equals the masked product.

The reference writes the whole [s, (k + 1) s] mask out. Tolerances: float32 sums in another order
(1e-5 of the norm); in bfloat16 weights and results are rounded to 8 bits (1e-2).
"""

from __future__ import annotations

import math

import pytest
import torch

from post_training.drafts.eagle3.attention import StepAttention

SHAPES = [(4, 4, 33, 2), (4, 2, 40, 3), (6, 2, 17, 4), (2, 1, 5, 4)]  # heads, groups, rows, steps
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PLACES = [
    pytest.param("cpu", torch.float32, 1e-5, id="cpu"),
    pytest.param("cpu", torch.bfloat16, 1e-2, id="cpu-bf16"),
    pytest.param("cuda", torch.bfloat16, 1e-2, id="cuda-bf16", marks=CUDA),
    pytest.param("cuda", torch.float32, 1e-5, id="cuda", marks=CUDA),
]


def masked(query, keys, values):
    """Row i sees keys 0 .. i - k of step 0 and key i - k + m of step m (figure 7 of EAGLE-3)."""
    length, steps = query.shape[2], len(keys)
    repeats = query.shape[1] // keys[0].shape[1]
    key, value = (torch.cat(each, 2).repeat_interleave(repeats, 1) for each in (keys, values))
    row = torch.arange(length)[:, None]
    column = torch.arange(length)[None, :]
    last = steps - 1
    masks = [column <= row - last, *(column == row - last + m for m in range(1, steps))]
    scores = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(
        ~torch.cat(masks, 1), float("-inf")
    )
    return torch.softmax(scores, -1) @ value


def drawn(shape, size=16):
    heads, groups, length, steps = shape
    torch.manual_seed(0)

    def tensor(count):
        return torch.randn(2, count, length, size, requires_grad=True)

    return tensor(heads), *([tensor(groups) for _ in range(steps)] for _ in range(2))


def compare_with_masked(device, dtype, tolerance, shape, size=16):
    """Results and gradients of every step against the masked product."""
    query, keys, values = drawn(shape, size)
    later = shape[3] - 1
    weight = torch.randn(query.shape)
    weight[:, :, :later] = 0  # rows without a predecessor at every step are not used
    leaves = (query, *keys, *values)
    expected = masked(query, keys, values)
    gradients = torch.autograd.grad((expected[:, :, later:] * weight[:, :, later:]).sum(), leaves)

    def as_called(tensor):
        return tensor.to(device, dtype).permute(2, 0, 1, 3)

    attention = StepAttention()
    for key, value in zip(keys, values, strict=True):
        found = attention(as_called(query), as_called(key), as_called(value))
    found = found.unflatten(-1, (shape[0], -1)).permute(1, 2, 0, 3)
    assert not found[:, :, :later].isnan().any()
    found_gradients = torch.autograd.grad((found * weight.to(device)).sum(), leaves)
    pairs = [(found[:, :, later:].cpu(), expected[:, :, later:])]
    for mine, reference in (*pairs, *zip(found_gradients, gradients, strict=True)):
        assert mine.isfinite().all()
        assert (mine - reference).norm() <= tolerance * reference.norm() + 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
def test_every_step_equals_the_masked_product(device, dtype, tolerance, shape):
    compare_with_masked(device, dtype, tolerance, shape)


@pytest.mark.parametrize(("device", "dtype", "tolerance"), PLACES)
@pytest.mark.parametrize("size", [4, 20, 264])
def test_heads_of_any_size_give_the_same(device, dtype, tolerance, size):
    compare_with_masked(device, dtype, tolerance, SHAPES[1], size)


def test_a_sequence_shorter_than_the_steps_has_no_row_that_is_used():
    attention = StepAttention()
    tensor = torch.randn(2, 1, 2, 8)
    for _ in range(3):
        found = attention(tensor, tensor, tensor)
    assert found.shape == (2, 1, 16)
    assert not found.any()
