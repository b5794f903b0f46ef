"""GPTQ of one weight: on the grid, better than rounding to nearest, and calm about odd inputs."""

from __future__ import annotations

from types import SimpleNamespace

import portable_helpers  # noqa: F401  (before megatron-core)
import pytest
import torch

from post_training.quantization import gptq, gptq_rounding

ROWS, COLUMNS = 48, 256


def linear(weight, bits, group, dtype=torch.float32):
    """What :func:`gptq_rounding.quantize` reads of a calibrated linear."""
    largest = 2 ** (bits - 1) - 1
    amax = weight.unflatten(1, (-1, group)).abs().amax(2).reshape(-1, 1)
    amax = (amax / largest).bfloat16().float() * largest
    quantizer = SimpleNamespace(maxbound=largest, _amax=amax)
    parameter = torch.nn.Parameter(weight.clone().to(dtype), requires_grad=False)
    return SimpleNamespace(weight=parameter, weight_quantizer=quantizer)


def inputs(tokens=1024):
    """Correlated, as hidden states are; two of them always zero."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(COLUMNS // 4, COLUMNS, generator=generator)
    found = torch.randn(tokens, COLUMNS // 4, generator=generator) @ mixing
    found += 0.3 * torch.randn(tokens, COLUMNS, generator=generator)
    found[:, [3, 200]] = 0
    return found


def weights():
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) * 0.05


def steps_of(layer):
    """The distance between two codes of each weight."""
    amax = layer.weight_quantizer._amax.reshape(ROWS, -1) / layer.weight_quantizer.maxbound
    return amax.repeat_interleave(COLUMNS // amax.shape[1], 1)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 64), (4, 256), (8, 256)])
def test_outputs_are_nearer_than_those_of_rounding_and_weights_are_on_the_grid(bits, group):
    x, weight = inputs(), weights()
    layer = linear(weight, bits, group)
    codes = (weight / steps_of(layer)).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    nearest = codes * steps_of(layer)
    ratio = gptq_rounding.quantize(layer, x.T @ x)
    before = (x @ (nearest - weight).T).square().sum()
    after = (x @ (layer.weight - weight).T).square().sum()
    assert after < 0.5 * before
    assert ratio == pytest.approx(float(after / before), rel=1e-3)
    steps = steps_of(layer)
    assert torch.equal(steps, steps.bfloat16().float())
    codes = (layer.weight / steps).round()
    assert codes.min() >= -(2 ** (bits - 1))
    assert codes.max() <= 2 ** (bits - 1) - 1
    assert torch.equal(codes * steps, layer.weight)


def test_codes_survive_weights_in_bfloat16():
    x = inputs()
    exact = linear(weights().bfloat16().float(), 8, COLUMNS)
    rounded = linear(weights().bfloat16().float(), 8, COLUMNS, torch.bfloat16)
    for layer in (exact, rounded):
        assert gptq_rounding.quantize(layer, x.T @ x) < 1
    codes = [(layer.weight.float() / steps_of(layer)).round() for layer in (exact, rounded)]
    assert torch.equal(*codes)


def test_an_input_that_was_always_zero_is_rounded_to_nearest_and_changes_nothing_else():
    x, weight = inputs(), weights()
    layer, other = linear(weight, 8, COLUMNS), linear(weight, 8, COLUMNS)
    other.weight.data[:, 3] = weight[:, 3].flip(0)
    for each in (layer, other):
        other_amax = layer.weight_quantizer._amax.clone()
        each.weight_quantizer._amax = other_amax
        gptq_rounding.quantize(each, x.T @ x)
    step = steps_of(layer)[:, 3]
    assert torch.equal(layer.weight[:, 3], (weight[:, 3] / step).round() * step)
    others = [n for n in range(COLUMNS) if n != 3]
    assert torch.equal(layer.weight[:, others], other.weight[:, others])


@pytest.mark.parametrize("hessian", ["zero", "identity"])
def test_nothing_to_gain_leaves_the_weight_to_rounding(hessian):
    weight = weights()
    layer = linear(weight, 8, COLUMNS)
    sums = torch.zeros(COLUMNS, COLUMNS) if hessian == "zero" else torch.eye(COLUMNS)
    assert gptq_rounding.quantize(layer, sums) is None
    assert torch.equal(layer.weight, weight)


def test_a_singular_hessian_is_damped():
    x = inputs(tokens=16)
    layer = linear(weights(), 4, 128)
    assert gptq_rounding.quantize(layer, x.T @ x) < 0.5
    assert layer.weight.isfinite().all()


def test_a_row_of_zeros_stays_zero():
    weight, x = weights(), inputs()
    weight[5] = 0
    layer = linear(weight, 4, 128)
    layer.weight_quantizer._amax[layer.weight_quantizer._amax == 0] = 7.0
    gptq_rounding.quantize(layer, x.T @ x)
    assert not layer.weight[5].any()
    assert (layer.weight_quantizer._amax.reshape(ROWS, -1)[5] == 7).all()


def test_the_hessians_of_many_experts_are_collected_in_parts():
    """Those of DeepSeek-V3's 256 experts, 7,168 inputs each, would take 53 GB."""
    with torch.device("meta"):
        experts = [torch.nn.Linear(7168, 2048) for _ in range(256)]
    parts = list(gptq._parts(experts))
    assert [each for part in parts for each in part] == experts
    assert max(map(len, parts)) * 4 * 7168**2 <= 8 << 30
