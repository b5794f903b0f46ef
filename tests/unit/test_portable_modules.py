"""The stand-in's layers against plain torch and transformers: values, gradients, state."""

from __future__ import annotations

from typing import Any

import portable_helpers as helpers
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

import transformer_engine.pytorch as te

pytestmark = pytest.mark.skipif(
    helpers.REPORT.real_transformer_engine, reason="the real Transformer Engine runs here"
)
DTYPES = [torch.float32, torch.bfloat16]
DEVICE = {"device": helpers.DEVICE}


def gradients(out: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out, leaves, helpers.random(*out.shape, seed=9, dtype=out.dtype))


def filled(module: torch.nn.Module) -> torch.nn.Module:
    """The module with random parameters."""
    with torch.no_grad():
        for seed, parameter in enumerate(module.parameters()):
            parameter.copy_(helpers.random(*parameter.shape, seed=100 + seed))
    return module


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("original", [LlamaRMSNorm, Qwen3RMSNorm])
def test_rms_norm_equals_transformers_bit_for_bit(original, dtype):
    mine = filled(te.RMSNorm(64, eps=1e-6, params_dtype=dtype, **DEVICE))
    theirs = original(64, eps=1e-6).to(helpers.DEVICE, dtype)
    theirs.weight.data.copy_(mine.weight.data)
    inp = helpers.random(5, 3, 64, dtype=dtype).requires_grad_()
    # A GPU adds the squares in another order: in float32 the last bit may differ.
    exact = dtype != torch.float32 or helpers.DEVICE.type == "cpu"
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(mine(inp), theirs(inp), **tolerance)
    for a, b in zip(
        gradients(mine(inp), [inp, mine.weight]),
        gradients(theirs(inp), [inp, theirs.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer_norm_equals_torch(dtype):
    mine = filled(te.LayerNorm(64, params_dtype=dtype, **DEVICE))
    inp = helpers.random(5, 64, dtype=dtype).requires_grad_()
    theirs = F.layer_norm(inp, (64,), mine.weight, mine.bias, 1e-5)
    assert torch.equal(mine(inp), theirs)


@pytest.mark.parametrize("norm", [te.LayerNorm, te.RMSNorm])
def test_zero_centered_weights_start_at_zero_and_count_from_one(norm):
    shifted, plain = norm(16, zero_centered_gamma=True, **DEVICE), norm(16, **DEVICE)
    assert shifted.weight.count_nonzero() == 0
    inp = helpers.random(3, 16)
    assert torch.equal(shifted(inp), plain(inp))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_torch_forward_and_backward(dtype, bias):
    mine: Any = filled(te.Linear(16, 24, bias=bias, params_dtype=dtype, **DEVICE))
    inp = helpers.random(5, 3, 16, dtype=dtype).requires_grad_()
    theirs = F.linear(inp, mine.weight, mine.bias)
    assert torch.equal(mine(inp), theirs)
    leaves = [inp, *mine.parameters()]
    for a, b in zip(gradients(mine(inp), leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert torch.equal(mine(inp), theirs)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norm_and_linear_in_one_equal_the_two_in_turn(normalization, zero_centered):
    mine: Any = filled(
        te.LayerNormLinear(
            16,
            24,
            eps=1e-6,
            normalization=normalization,
            zero_centered_gamma=zero_centered,
            **DEVICE,
        )
    )
    assert (mine.layer_norm_bias is None) == (normalization == "RMSNorm")
    inp = helpers.random(5, 3, 16).requires_grad_()
    weight = mine.layer_norm_weight + (1 if zero_centered else 0)
    if normalization == "RMSNorm":
        normed = F.rms_norm(inp, (16,), weight, 1e-6)
    else:
        normed = F.layer_norm(inp, (16,), weight, mine.layer_norm_bias, 1e-6)
    theirs = F.linear(normed, mine.weight, mine.bias)
    torch.testing.assert_close(mine(inp), theirs)
    leaves = [inp, *mine.parameters()]
    for a, b in zip(gradients(mine(inp), leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(mine(inp), theirs)


@pytest.mark.parametrize("return_bias", [True, False])
def test_the_normalized_input_is_returned_on_request(return_bias):
    mine: Any = filled(te.LayerNormLinear(16, 24, return_bias=return_bias, **DEVICE))
    # Set afterwards, as ModelOpt does while it scores a model for pruning.
    mine.return_layernorm_output = True
    inp = helpers.random(5, 16).requires_grad_()
    out, *bias, normalized = mine(inp)
    assert bias == ([mine.bias] if return_bias else [])
    expected = F.layer_norm(inp, (16,), mine.layer_norm_weight, mine.layer_norm_bias, 1e-5)
    torch.testing.assert_close(normalized, expected)
    theirs = F.linear(expected, mine.weight, None if return_bias else mine.bias)
    torch.testing.assert_close(
        gradients(out + normalized.sum(), [inp])[0],
        gradients(theirs + expected.sum(), [inp])[0],
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("splits", [[3, 0, 5], [0, 0, 8]])
def test_grouped_linear_applies_each_weight_to_its_rows(bias, splits):
    mine: Any = filled(te.GroupedLinear(3, 16, 24, bias=bias, **DEVICE))
    inp = helpers.random(8, 16).requires_grad_()
    theirs = torch.cat(
        [
            F.linear(rows, getattr(mine, f"weight{i}"), getattr(mine, f"bias{i}", None))
            for i, rows in enumerate(inp.split(splits))
        ]
    )
    torch.testing.assert_close(mine(inp, splits), theirs)
    leaves = [inp, *mine.parameters()]
    for a, b in zip(gradients(mine(inp, splits), leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_returned_bias_is_not_added():
    mine: Any = filled(te.Linear(16, 24, return_bias=True, **DEVICE))
    inp = helpers.random(5, 16)
    out, bias = mine(inp)
    assert bias is mine.bias
    assert torch.equal(out, F.linear(inp, mine.weight))


@pytest.mark.parametrize(
    "module", [te.Linear, te.LayerNormLinear], ids=["linear", "norm and linear"]
)
def test_weight_gradients_are_left_to_data_parallelism_to_accumulate(module):
    mine = module(16, 24, bias=False, fuse_wgrad_accumulation=True, **DEVICE)
    inp = helpers.random(5, 16)
    mine(inp).sum().backward()
    expected = mine.weight.grad
    mine.zero_grad()
    mine.weight.main_grad = torch.ones_like(mine.weight)
    mine(inp).sum().backward()
    # megatron-core's data parallelism adds `grad` unless `grad_added_to_main_grad` is set.
    torch.testing.assert_close(mine.weight.grad, expected)
    torch.testing.assert_close(mine.weight.main_grad, torch.ones_like(mine.weight))
    assert not getattr(mine.weight, "grad_added_to_main_grad", False)


@pytest.mark.parametrize(
    "module",
    [
        te.Linear(4, 4),
        te.LayerNormLinear(4, 4),
        te.GroupedLinear(2, 4, 4),
        te.RMSNorm(4),
        te.LayerNorm(4),
        te.DotProductAttention(2, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_every_module_has_extra_state_in_its_state_dict(module):
    state = module.state_dict()
    assert state["_extra_state"].numel() == 0
    assert not any(module.load_state_dict(state))


def test_parameters_say_how_they_are_split():
    column = te.Linear(8, 8, parallel_mode="column", tp_size=2, sequence_parallel=True)
    row = te.Linear(8, 8, parallel_mode="row", tp_size=2, sequence_parallel=True)
    assert (column.weight.shape, row.weight.shape) == ((4, 8), (8, 4))
    assert (column.out_features, row.in_features) == (4, 4)
    assert (column.weight.partition_dim, row.weight.partition_dim) == (0, 1)
    assert column.bias.tensor_model_parallel
    assert not row.bias.tensor_model_parallel
    assert row.bias.sequence_parallel
    with pytest.raises(ValueError, match="out_features=9 is not divisible by tp_size=2"):
        te.Linear(8, 9, parallel_mode="column", tp_size=2)


def test_rotary_embedding_equals_transformers():
    length, size = 7, 8
    t = helpers.random(length, 2, 3, size)
    inverse = 10000.0 ** -(torch.arange(0, size, 2, device=helpers.DEVICE) / size)
    angles = torch.outer(torch.arange(length, device=helpers.DEVICE), inverse)
    angles = torch.cat([angles, angles], dim=-1)
    by_head = t.permute(1, 2, 0, 3)
    expected, _ = apply_rotary_pos_emb(by_head, by_head, angles.cos()[None], angles.sin()[None])
    mine = te.attention.rope.apply_rotary_pos_emb(t, angles[:, None, None])
    torch.testing.assert_close(mine, expected.permute(2, 0, 1, 3))


def test_rotary_embedding_of_neighbours_leaves_further_channels_alone():
    t = helpers.random(7, 2, 3, 8)
    angles = helpers.random(9, 1, 1, 2, seed=1).repeat_interleave(2, dim=-1)
    mine = te.attention.rope.apply_rotary_pos_emb(t, angles, interleaved=True)
    turned = torch.polar(torch.ones_like(angles[:7, ..., ::2]), angles[:7, ..., ::2])
    pairs = torch.view_as_complex(t[..., :4].unflatten(-1, (2, 2))) * turned
    expected = torch.cat([torch.view_as_real(pairs).flatten(-2), t[..., 4:]], dim=-1)
    torch.testing.assert_close(mine, expected)


@pytest.mark.parametrize("config", [{"fp8": "hybrid"}, {"fp4": "e2m1"}], ids=["fp8", "fp4"])
def test_a_model_in_fp8_or_fp4_is_refused(config):
    from megatron.core.fp4_utils import get_fp4_context
    from megatron.core.fp8_utils import get_fp8_context
    from megatron.core.transformer import TransformerConfig

    shape = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "bf16": True}
    enter = get_fp8_context if "fp8" in config else get_fp4_context
    with pytest.raises(NotImplementedError, match="install transformer_engine"):
        enter(TransformerConfig(**shape, **config))


def test_fp8_computation_is_refused():
    with te.fp8_autocast(enabled=False):
        pass
    with pytest.raises(NotImplementedError, match="install transformer_engine"), te.fp8_autocast():
        pass
