"""NaN and infinite weights are found in every number format that a model can hold."""

from __future__ import annotations

import pytest
import torch

from post_training.checkpoints.finite import check_model, describe_not_finite
from post_training.common.errors import UsageError

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


@pytest.mark.parametrize("name", ["weight_quantizer._amax", "k_bmm_quantizer._scale"])
def test_a_maximum_or_a_scale_is_not_negative(name):
    model = torch.nn.Module()
    model.linear = torch.nn.Module()
    model.linear.weight_quantizer = torch.nn.Module()
    model.linear.k_bmm_quantizer = torch.nn.Module()
    quantizer, _, kind = name.partition(".")
    getattr(model.linear, quantizer).register_buffer(kind, torch.tensor([1.0, 0.0]))
    check_model(model, "checkpoint")
    getattr(getattr(model.linear, quantizer), kind)[1] = -1
    with pytest.raises(UsageError, match=f"linear.{name} is negative"):
        check_model(model, "checkpoint")
