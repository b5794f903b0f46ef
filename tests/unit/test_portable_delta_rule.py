"""The gated delta rule without kernels is the plain recurrence, in one go and in pieces."""

from __future__ import annotations

import portable_helpers
import pytest
import torch

from post_training.portable import delta_rule

HEADS, KEY, VALUE, TOKENS = 3, 5, 7, 150  # two whole chunks and a part
REPORT = portable_helpers.REPORT


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return {
        "q": torch.randn(2, TOKENS, HEADS, KEY, requires_grad=True),
        "k": torch.randn(2, TOKENS, HEADS, KEY, requires_grad=True),
        "v": torch.randn(2, TOKENS, HEADS, VALUE, requires_grad=True),
        # From hardly any decay to one that no difference of sums in float32 may be exponentiated.
        "g": (-(torch.rand(2, TOKENS, HEADS) * 4).exp()).requires_grad_(),
        "beta": torch.rand(2, TOKENS, HEADS, requires_grad=True),
        "initial_state": torch.randn(2, HEADS, KEY, VALUE),
    }


def recurrence(q, k, v, g, beta, initial_state):
    """Token by token, as the definition says; queries and keys are normalized."""
    q, k = (each / (each.square().sum(-1, keepdim=True) + 1e-6).sqrt() for each in (q, k))
    state, found = initial_state, []
    for t in range(q.shape[1]):
        state = g[:, t, :, None, None].exp() * state
        wrong = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * wrong)
        found.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) / KEY**0.5)
    return torch.stack(found, 1), state


def run(values, state=None):
    values = {name: each for name, each in values.items() if name != "initial_state"}
    return delta_rule.chunk_gated_delta_rule(
        **values, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def test_chunks_give_the_recurrence_and_its_gradients(inputs):
    wanted, last = recurrence(**inputs)
    actual, state = run(inputs, inputs["initial_state"])
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)
    leaves = [each for each in inputs.values() if each.requires_grad]
    weight = torch.randn_like(wanted)
    gradients = (torch.autograd.grad((each * weight).sum(), leaves) for each in (actual, wanted))
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cut", [1, 64, 100])
def test_a_text_in_two_pieces_gives_what_it_gives_whole(inputs, cut):
    wanted, last = run(inputs)
    first, second = (
        {name: each[:, part] for name, each in inputs.items()}
        for part in (slice(None, cut), slice(cut, None))
    )
    begun, state = run(first)
    ended, state = run(second, state)
    torch.testing.assert_close(torch.cat([begun, ended], 1), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-4, atol=1e-5)


def test_it_stands_in_where_the_kernels_cannot_run():
    from megatron.core.ssm.gated_delta_net import common

    if not delta_rule.why_not():
        pytest.skip("fla runs here")
    assert common.HAVE_FLA
    assert common.chunk_gated_delta_rule is delta_rule.chunk_gated_delta_rule
    with pytest.raises(NotImplementedError, match="packed"):
        zeros = torch.zeros(1, 1, 1, 1)
        numbers = zeros[..., 0]
        delta_rule.chunk_gated_delta_rule(
            zeros, zeros, zeros, numbers, numbers, cu_seqlens=torch.tensor([0, 1])
        )


def test_kernels_compute_16_bits_alone(inputs):
    def kernels(q, *_others, **_options):
        return q.dtype

    rule = delta_rule.by_precision(kernels)
    assert rule(torch.zeros(1, dtype=torch.bfloat16)) is torch.bfloat16
    output, _ = rule(**inputs)
    assert torch.equal(output, delta_rule.chunk_gated_delta_rule(**inputs)[0])
