"""NaN and infinite weights are found in every number format that a model can hold."""

from __future__ import annotations

import pytest
import torch

from post_training.checkpoints.finite import describe_not_finite

FORMATS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_value_that_is_not_finite_is_named(dtype, value):
    weight = torch.ones(4, 6)
    weight[3, 5] = value
    named = [("a", torch.ones(2)), ("b", weight.to(dtype)), ("c", torch.arange(3))]
    if not torch.isfinite(named[1][1].float()).all():  # e4m3fn saturates infinity in some versions
        assert describe_not_finite(named) == (
            "b has 1 values that are not finite, the first at [3, 5]"
        )


@pytest.mark.parametrize("dtype", FORMATS)
def test_the_largest_finite_values_pass(dtype):
    """Their sum overflows, which alone is no reason."""
    weight = torch.full((8, 64), torch.finfo(dtype).max).to(dtype)
    assert describe_not_finite([("a", weight), ("b", torch.empty(0, dtype=dtype))]) is None


def test_integers_and_meta_tensors_are_left_out():
    assert (
        describe_not_finite([("a", torch.ones(2, device="meta")), ("b", torch.ones(2).int())])
        is None
    )
    assert describe_not_finite([]) is None
