"""The gated delta rule without the kernels of ``fla`` (flash-linear-attention).

megatron-core's gated delta nets refuse to be built without that package. :func:`install` gives the
module the rule in PyTorch where the kernels, which are Triton's, cannot run, and for float32, whose
products they round to 11 bits, or which they refuse, by version. Names and arguments are ``fla``'s;
the algorithm is written from the paper (arXiv 2412.06464). CPU and CUDA, differentiable.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from post_training.portable import imports

PACKAGE = "fla"
Rule = Callable[..., Any]
_CHUNK = 64
_SMALLEST_SQUARE = 1e-6  # what fla and transformers add to the sum of squares of a key


@functools.cache
def why_not() -> str:
    """Why the kernels of ``fla`` cannot run here; empty if they can."""
    return imports.why_not_on_gpu(PACKAGE)


def install() -> None:
    """Let megatron-core's gated delta nets run here."""
    imports.on_import("megatron.core.ssm.gated_delta_net.common", _change)


def _change(module: ModuleType) -> None:
    has_kernels = not why_not() and module.HAVE_FLA
    rule = by_precision(module.chunk_gated_delta_rule) if has_kernels else chunk_gated_delta_rule
    vars(module).update(HAVE_FLA=True, chunk_gated_delta_rule=rule)


def where(rule: Rule) -> str:
    """On what a layer's ``rule`` runs, in words."""
    if rule is not chunk_gated_delta_rule:
        return f"on {PACKAGE}'s kernels in 16 bits"
    return f"in PyTorch: {why_not() or f'megatron-core cannot import the installed {PACKAGE}'}"


def by_precision(kernels: Rule) -> Rule:
    """The rule that takes ``kernels`` for 16 bits, and what is here for float32."""

    @functools.wraps(chunk_gated_delta_rule)
    def rule(q: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        chosen = chunk_gated_delta_rule if q.dtype == torch.float32 else kernels
        return chosen(q, *arguments, **options)

    return rule


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    **_options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Let a state of each head forget, correct it at each key, and read it at each query.

    With the state S before a token: S decays to exp(g) S, then what it has at the key, S^T k, moves
    towards the value by the share beta, and the output is S^T q.

    Args:
        q: [b, s, h, k].
        k: as q.
        v: [b, s, h, v].
        g: [b, s, h], logarithms of the decay.
        beta: [b, s, h].
        scale: of the queries; by default one over the root of their size.
        initial_state: [b, h, k, v]; zeros by default.
        output_final_state: whether the state after the last token is given back, in float32.
        use_qk_l2norm_in_kernel: normalize queries and keys first.

    Returns:
        The outputs, [b, s, h, v] in the dtype of ``q``, and the last state or None. Everything is
        computed in float32.
    """
    if cu_seqlens is not None:
        raise NotImplementedError("packed sequences of gated delta nets need fla and a GPU")
    dtype, scale = q.dtype, q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v, g, beta = (each.float().transpose(1, 2) for each in (q, k, v, g, beta))
    if use_qk_l2norm_in_kernel:
        q, k = _normalized(q), _normalized(k)
    state = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1])
    state = state if initial_state is None else initial_state.float()
    outputs = []
    sizes = [_CHUNK] * (q.shape[2] // _CHUNK) + [q.shape[2] % _CHUNK] * (q.shape[2] % _CHUNK > 0)
    chunks = (each.split(sizes, dim=2) for each in (q * scale, k, v, g, beta))
    for queries, *others in zip(*chunks, strict=True):
        output, state = _chunk(state, queries, *others)
        outputs.append(output)
    found = torch.cat(outputs, dim=2).transpose(1, 2).to(dtype)
    return found, state if output_final_state else None


def _chunk(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of some tokens, [b, h, s, v], and the state after them.

    What token i writes is beta_i (v_i - exp(G_i) S^T k_i - sum over j < i of exp(G_i - G_j)
    (k_i k_j) u_j), with G the sums of g: a triangular system for all u.
    """
    total = g.cumsum(-1)
    lower = torch.ones(g.shape[-1], g.shape[-1], dtype=torch.bool, device=g.device).tril()
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~lower, -torch.inf).exp()
    decay, share = total.exp().unsqueeze(-1), beta.unsqueeze(-1)
    system = (share * between * (k @ k.mT)).tril(-1)
    wanted = share * (v - (decay * k) @ state)
    # The diagonal is taken for ones.
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    output = (decay * q) @ state + (between * (q @ k.mT)) @ written
    last = total[..., -1:]
    kept = (last - total).exp().unsqueeze(-1) * k
    return output, last.exp().unsqueeze(-1) * state + kept.mT @ written


def _normalized(values: torch.Tensor) -> torch.Tensor:
    return values * torch.rsqrt(values.square().sum(-1, keepdim=True) + _SMALLEST_SQUARE)
