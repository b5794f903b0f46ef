"""The Mamba-2 scan without kernels is the plain recurrence, in one go, in pieces and by steps."""

from __future__ import annotations

import portable_helpers as helpers
import pytest
import torch
from torch.nn import functional

from post_training.portable import mamba

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for the CPU")
HEADS, GROUPS, CHANNELS, STATE, WIDTH = 6, 2, 5, 7, 4
INNER, MIXED = HEADS * CHANNELS, HEADS * CHANNELS + 2 * GROUPS * STATE
REPORT = helpers.REPORT


def kernels():
    from mamba_ssm.ops.triton import layernorm_gated, ssd_combined

    return layernorm_gated, ssd_combined


@pytest.fixture
def scan():
    """Inputs of a scan over 19 tokens, by the names of its arguments."""
    torch.manual_seed(0)
    return {
        "x": torch.randn(2, 19, HEADS, CHANNELS, requires_grad=True),
        "dt": torch.randn(2, 19, HEADS, requires_grad=True),
        "A": -torch.rand(HEADS) * 8,
        "B": torch.randn(2, 19, GROUPS, STATE, requires_grad=True),
        "C": torch.randn(2, 19, GROUPS, STATE, requires_grad=True),
        "D": torch.randn(HEADS),
        "dt_bias": torch.randn(HEADS),
        "initial_states": torch.randn(2, HEADS, CHANNELS, STATE),
    }


def recurrence(x, dt, A, B, C, D, dt_bias, initial_states):
    """Token by token and head by head, as the definition says."""
    steps, state, found = functional.softplus(dt + dt_bias), initial_states, []
    for t in range(x.shape[1]):
        outputs, states = [], []
        for h in range(HEADS):
            group = h // (HEADS // GROUPS)
            step, b, c = steps[:, t, h, None, None], B[:, t, group], C[:, t, group]
            now = (step * A[h]).exp() * state[:, h]
            now = now + step * x[:, t, h, :, None] * b[:, None, :]
            states.append(now)
            outputs.append((now * c[:, None, :]).sum(-1) + D[h] * x[:, t, h])
        state = torch.stack(states, 1)
        found.append(torch.stack(outputs, 1))
    return torch.stack(found, 1), state


@pytest.mark.parametrize("chunk", [1, 4, 19, 128])
def test_chunks_of_any_size_give_the_recurrence_and_its_gradients(scan, chunk):
    wanted, last = recurrence(**scan)
    leaves = [scan[name] for name in ("x", "dt", "B", "C")]
    slopes = torch.autograd.grad(wanted.square().sum() + last.sum(), leaves)
    y, state = kernels()[1].mamba_chunk_scan_combined(
        chunk_size=chunk, dt_softplus=True, return_final_states=True, **scan
    )
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)
    mine = torch.autograd.grad(y.square().sum() + state.sum(), leaves)
    for actual, slope in zip(mine, slopes, strict=True):
        torch.testing.assert_close(actual, slope, atol=1e-3, rtol=1e-3)


def test_steps_that_leave_nothing_of_a_state_are_finite(scan):
    scan["A"] = torch.full((HEADS,), -1e4)
    y = kernels()[1].mamba_chunk_scan_combined(chunk_size=8, dt_softplus=True, **scan)
    slopes = torch.autograd.grad(y.sum(), [scan["x"], scan["dt"]])
    assert all(each.isfinite().all() for each in (y, *slopes))


def test_steps_are_limited_and_rows_have_one_sequence(scan):
    run = kernels()[1].mamba_chunk_scan_combined
    limited = run(chunk_size=8, dt_limit=(0.1, 0.2), **scan)
    bounded = {**scan, "dt": (scan["dt"] + scan["dt_bias"]).clamp(0.1, 0.2), "dt_bias": None}
    torch.testing.assert_close(limited, run(chunk_size=8, **bounded))
    with pytest.raises(NotImplementedError, match="several sequences"):
        run(chunk_size=8, seq_idx=torch.zeros(2, 19), **scan)


def test_the_fused_path_and_steps_equal_convolution_scan_and_gate():
    torch.manual_seed(1)
    projected = torch.randn(2, 11, INNER + MIXED + HEADS)
    weight, bias = torch.randn(MIXED, WIDTH), torch.randn(MIXED)
    A, D, dt_bias = -torch.rand(HEADS), torch.randn(HEADS), torch.randn(HEADS)
    conv = torch.nn.Conv1d(MIXED, MIXED, WIDTH, groups=MIXED, padding=WIDTH - 1)
    conv.load_state_dict({"weight": weight.unsqueeze(1), "bias": bias})
    gate, mixed, dt = projected.split([INNER, MIXED, HEADS], dim=-1)
    x, B, C = (
        functional.silu(conv(mixed.mT)[..., :11].mT)
        .split([INNER, GROUPS * STATE, GROUPS * STATE], dim=-1)
    )  # fmt: skip
    x = x.unflatten(-1, (HEADS, -1))
    B, C = (each.unflatten(-1, (GROUPS, -1)) for each in (B, C))
    zeros = torch.zeros(2, HEADS, CHANNELS, STATE)
    wanted, last = recurrence(x, dt, A, B, C, D, dt_bias, zeros)
    gated = wanted.flatten(-2) * functional.silu(gate)
    fused = kernels()[1].mamba_split_conv1d_scan_combined(
        *(projected, weight, bias, dt_bias, A, D, 4), headdim=CHANNELS, ngroups=GROUPS
    )
    torch.testing.assert_close(fused, gated, atol=1e-5, rtol=1e-5)

    # The same in steps of one token, then of two.
    conv_state, state, found = torch.zeros(2, MIXED, WIDTH), zeros.clone(), []
    wide = A.view(-1, 1, 1).expand(-1, CHANNELS, STATE)
    per_channel = [each.unsqueeze(-1).expand(-1, CHANNELS) for each in (D, dt_bias)]
    for part in (slice(0, 1), slice(1, 2), *(slice(i, i + 2) for i in range(2, 11, 2))):
        y = mamba.causal_conv1d_update(mixed[:, part], conv_state, weight, bias, "silu")
        x, B, C = y.split([INNER, GROUPS * STATE, GROUPS * STATE], dim=-1)
        found.append(
            mamba.selective_state_update(
                state,
                x.unflatten(-1, (HEADS, -1)),
                dt[:, part].unsqueeze(-1).expand(-1, -1, -1, CHANNELS),
                wide,
                B.unflatten(-1, (GROUPS, -1)),
                C.unflatten(-1, (GROUPS, -1)),
                per_channel[0],
                z=gate[:, part].unflatten(-1, (HEADS, -1)),
                dt_bias=per_channel[1],
                dt_softplus=True,
            ).flatten(-2)
        )
    torch.testing.assert_close(torch.cat(found, 1), gated, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conv_state, mixed.mT[..., -WIDTH:])


@pytest.mark.parametrize("first", [True, False])
def test_the_norm_is_of_each_group_and_the_gate_before_or_after_it(first):
    torch.manual_seed(2)
    norm = kernels()[0].RMSNorm(12, eps=1e-5, group_size=4, norm_before_gate=first)
    norm.weight.data.uniform_(0.5, 1.5)
    x, z = torch.randn(3, 12), torch.randn(3, 12)
    gate = functional.silu(z)
    groups = (x if first else x * gate).reshape(3, 3, 4)
    wanted = functional.rms_norm(groups, (4,), eps=1e-5).reshape(3, 12) * norm.weight
    torch.testing.assert_close(norm(x, z), wanted * gate if first else wanted)
    assert norm(x.bfloat16(), z.bfloat16()).dtype == torch.bfloat16


def test_megatron_takes_the_stand_in_and_the_steps():
    from megatron.core.ssm import mamba_mixer

    assert mamba_mixer.HAVE_MAMBA_SSM
    assert not mamba_mixer.MAMBA_HAS_STATE_DTYPE
    assert mamba_mixer.RMSNormGated is kernels()[0].RMSNorm
    assert mamba_mixer.selective_state_update is mamba.selective_state_update
    assert mamba_mixer.causal_conv1d_update is mamba.causal_conv1d_update
