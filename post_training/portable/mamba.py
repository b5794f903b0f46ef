"""Mamba-2 where its kernels cannot run: ``mamba_ssm`` as a stand-in, and one step of generation.

megatron-core has no Mamba layers without the package ``mamba_ssm``, whose kernels need a GPU; those
of its own that advance the states by one token (ssm/ops) need Triton on a GPU. On a GPU without
``mamba_ssm`` the stand-in's scan runs too, and megatron-core's steps. With it the stand-in's scan
is for float32, whose products the kernels round to 11 bits.
"""

from __future__ import annotations

import functools
import importlib
import logging
from types import ModuleType
from typing import Any

import torch
from torch.nn import functional

from post_training.portable import imports

PACKAGE = "mamba_ssm"
_SCANS = f"{PACKAGE}.ops.triton.ssd_combined"
logger = logging.getLogger(__name__)


@functools.cache
def why_not() -> str:
    """Why the kernels of the real package cannot run here; empty if they can."""
    return imports.why_not_on_gpu(PACKAGE)


def install() -> None:
    """Let megatron-core's Mamba layers run here."""
    if why_not():
        imports.load_stand_in(PACKAGE)
    else:
        imports.on_import("megatron.core.ssm.mamba_mixer", _by_precision)
    if not torch.cuda.is_available():
        imports.on_import("megatron.core.ssm.mamba_mixer", _step_on_cpu)


def stand_in_scans() -> ModuleType:
    """Where the real package is imported under its name."""
    return importlib.import_module(f"{imports.__package__}.site.{_SCANS}")


def _by_precision(module: ModuleType) -> None:
    stand_in = stand_in_scans()
    for name in ("mamba_chunk_scan_combined", "mamba_split_conv1d_scan_combined"):
        if kernel := getattr(module, name):
            setattr(module, name, _choice(kernel, getattr(stand_in, name)))


def _choice(kernel: Any, stand_in: Any) -> Any:
    @functools.wraps(kernel)
    def scan(x: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        if x.dtype != torch.float32:
            return kernel(x, *arguments, **options)
        options.pop("state_dtype", None)  # float32 in the stand-in
        return stand_in(x, *arguments, **options)

    return scan


def _step_on_cpu(module: ModuleType) -> None:
    vars(module).update(
        causal_conv1d_update=causal_conv1d_update, selective_state_update=selective_state_update
    )


def causal_conv1d_update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    conv_state_indices: torch.Tensor | None = None,
    intermediate_conv_states: torch.Tensor | None = None,
) -> torch.Tensor:
    """Convolve further tokens x, [b, s, d].

    Args:
        conv_state: [b, d, width], the last inputs, changed in place.
        weight: [d, width].
    """
    _require_static(conv_state_indices, intermediate_conv_states)
    width, found = weight.shape[-1], []
    seen = torch.cat([conv_state, x.mT], dim=-1)
    for end in range(width + 1, seen.shape[-1] + 1):
        found.append((seen[..., end - width : end] * weight).sum(-1))
    conv_state.copy_(seen[..., -width:])
    y = torch.stack(found, dim=1)
    y = y if bias is None else y + bias
    return functional.silu(y) if activation in ("silu", "swish") else y


def selective_state_update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: torch.Tensor | None = None,
    intermediate_ssm_states: torch.Tensor | None = None,
) -> torch.Tensor:
    """Advance the states [b, h, p, n] in place by the tokens of x, [b, s, h, p]; their outputs.

    Args:
        dt: [b, s, h, p], before ``dt_bias`` [h, p] and softplus.
        A: [h, p, n].
        B: [b, s, g, n]; a group serves h / g heads.
        C: as B.
        D: [h, p].
        z: as x; the outputs are multiplied by silu(z).
    """
    _require_static(state_batch_indices, intermediate_ssm_states)
    steps = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    steps = functional.softplus(steps) if dt_softplus else steps
    repeats, found, now = x.shape[2] // B.shape[2], [], state.float()
    keys, queries = (each.float().repeat_interleave(repeats, dim=2) for each in (B, C))
    for token in range(x.shape[1]):
        step = steps[:, token].unsqueeze(-1)
        added = step * x[:, token].float().unsqueeze(-1) * keys[:, token].unsqueeze(-2)
        now = now * (step * A.float()).exp() + added
        found.append((now @ queries[:, token].unsqueeze(-1)).squeeze(-1))
    state.copy_(now)
    y = torch.stack(found, dim=1)
    y = y if D is None else y + D.float() * x.float()
    y = y if z is None else y * functional.silu(z.float())
    return y.to(x.dtype)


def _require_static(*of_dynamic_batches: Any) -> None:
    if any(each is not None for each in of_dynamic_batches):
        raise NotImplementedError("dynamic batches of Mamba layers need a GPU")
