"""The Mamba-2 scan, chunk by chunk (state-space duality, arXiv 2405.21060, section 6).

A head with state S, [channels p, state size n], computes for each token ::

    S = exp(dt * A) * S + dt * outer(x, B)        y = S @ C + D * x

Within a chunk this is masked attention with queries C, keys B and values dt * x, each product
weakened by the decays between its two tokens; between chunks only the states are passed on. What
follows is that in float32, one chunk after another, so that a long text needs the memory of one.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional


def mamba_chunk_scan_combined(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The scan over whole sequences.

    Args:
        x: [b, l, h, p], values of h heads.
        dt: [b, l, h], time steps before ``dt_bias`` [h], softplus and ``dt_limit``.
        A: [h], negative.
        B: [b, l, g, n]; a group serves h / g heads.
        C: as B.
        D: [h] or [h, p].
        z: [b, l, h, p]; the result is multiplied by silu(z).
        initial_states: [b, h, p, n]; None: zeros.

    Returns:
        [b, l, h, p] in the dtype of ``x``; with ``return_final_states`` also the states after the
        last token, float32 [b, h, p, n].

    Raises:
        NotImplementedError: for several sequences in one row (``seq_idx``).
    """
    if seq_idx is not None:
        raise NotImplementedError("several sequences in one row need mamba_ssm's kernels")
    steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    if dt_softplus:
        steps = functional.softplus(steps)
    steps = steps.clamp(*dt_limit)
    decays = steps * A.float()
    inputs = x.float() * steps.unsqueeze(-1)
    batch, length, heads, channels = x.shape
    state = initial_states
    if state is None:
        state = x.new_zeros(batch, heads, channels, B.shape[-1], dtype=torch.float32)
    state, parts = state.float(), []
    for start in range(0, length, chunk_size):
        part = slice(start, start + chunk_size)
        found, state = _chunk(inputs[:, part], decays[:, part], B[:, part], C[:, part], state)
        parts.append(found)
    y = torch.cat(parts, dim=1)
    if D is not None:
        y = y + x.float() * (D.float() if D.dim() == 2 else D.float().unsqueeze(-1))
    if z is not None:
        y = y * functional.silu(z.float())
    y = y.to(x.dtype)
    return (y, state) if return_final_states else y


def _chunk(
    inputs: torch.Tensor,
    decays: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [b, q, h, p] of q tokens, and the state after them.

    Args:
        inputs: [b, q, h, p], dt * x.
        decays: [b, q, h], dt * A, logarithms of what is left of a state.
        state: [b, h, p, n], before the first token.
    """
    repeats = inputs.shape[2] // B.shape[2]
    # Heads first: [b, h, q, ...].
    values, left = inputs.transpose(1, 2), decays.transpose(1, 2).cumsum(-1)
    keys, queries = (
        each.float().transpose(1, 2).repeat_interleave(repeats, dim=1) for each in (B, C)
    )
    between = left.unsqueeze(-1) - left.unsqueeze(-2)
    later = torch.ones_like(between[0, 0], dtype=torch.bool).triu(1)
    # Masked before the exponential: what grows towards later tokens would overflow.
    weights = (queries @ keys.mT) * between.masked_fill(later, -math.inf).exp()
    y = weights @ values + (queries @ state.mT) * left.exp().unsqueeze(-1)
    to_the_end = (left[..., -1:] - left).exp().unsqueeze(-1)
    state = state * left[..., -1, None, None].exp() + (values * to_the_end).mT @ keys
    return y.transpose(1, 2), state


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """From the input projection to the gated output: convolution, scan and gate.

    Args:
        zxbcdt: [b, l, gate + x + B + C + dt], side by side.
        conv1d_weight: [channels of x, B and C; width], of the causal convolution.
        headdim: channels of a head; None: those of ``D`` [h, p].
        norm_before_gate: of no meaning without a norm, which megatron-core applies itself.

    Returns:
        [b, l, h * p].
    """
    heads = A.shape[0]
    inner = heads * (headdim or D.shape[-1])
    state = (conv1d_weight.shape[0] - inner) // (2 * ngroups)
    gate, mixed, dt = zxbcdt.split([inner, conv1d_weight.shape[0], heads], dim=-1)
    mixed = _convolved(mixed, conv1d_weight, conv1d_bias)
    if activation in ("silu", "swish"):
        mixed = functional.silu(mixed)
    x, B, C = mixed.split([inner, ngroups * state, ngroups * state], dim=-1)
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, -1)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=gate.unflatten(-1, (heads, -1)),
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
    )
    assert isinstance(y, torch.Tensor)
    return y.flatten(-2)


def _convolved(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Each channel of [b, l, d] with its own kernel over this token and those before it."""
    padded = functional.pad(x.mT, (weight.shape[-1] - 1, 0))
    return functional.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[-1]).mT
