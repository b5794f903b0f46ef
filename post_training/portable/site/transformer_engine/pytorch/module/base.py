"""What all modules share: extra state, initialisation of parameters."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["TransformerEngineBaseModule", "get_dummy_wgrad"]

Device = torch.device | str | int


def get_dummy_wgrad(shape: list[int], dtype: torch.dtype, zero: bool = False) -> torch.Tensor:
    """A gradient that only triggers hooks, where the true one was added to ``main_grad``.

    tensor_parallel/layers.py:57 imports it too and calls it (:701, :713) where gradients are
    accumulated in one kernel.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.zeros(shape, dtype=dtype, device=device)


class TransformerEngineBaseModule(torch.nn.Module):
    """Base of the modules.

    Extra state is defined on the class: ``torch`` looks for it there, and only then puts the
    ``_extra_state`` keys into state dicts that Transformer Engine has and in which ModelOpt keeps
    the state of quantizers.
    """

    def get_extra_state(self) -> torch.Tensor:
        """An empty byte tensor: no FP8 state."""
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        """Accept the extra state of a checkpoint; FP8 scales in it have no use here."""

    def backward_dw(self) -> None:
        """Weight gradients are never delayed; megatron-core calls it with
        ``delay_wgrad_compute`` (extensions/transformer_engine.py:1119)."""


def call(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Run an autograd function: ``apply`` with gradients, else ``forward`` with None for ``ctx``.

    ModelOpt replaces these attributes of the class while a quantized layer runs
    (quantization/plugins/transformer_engine.py:64, :105): they are looked up here, at each call.
    """
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(None, *arguments)


def fill(
    parameter: torch.nn.Parameter,
    init_method: Callable[[torch.Tensor], Any] | None,
    get_rng_state_tracker: Callable[[], Any] | None,
    rng_tracker_name: str | None,
) -> None:
    """Initialise ``parameter`` in place, with the tracker's state if there is one."""
    if parameter.is_meta:
        return
    context: Any = contextlib.nullcontext()
    if get_rng_state_tracker is not None:
        tracker = get_rng_state_tracker()
        context = tracker.fork(rng_tracker_name) if rng_tracker_name else tracker.fork()
    with torch.no_grad(), context:
        (init_method or _default_init)(parameter)


def _default_init(weight: torch.Tensor) -> None:
    torch.nn.init.normal_(weight, mean=0.0, std=0.023)


def mark(
    parameter: torch.nn.Parameter, parallel: bool, dimension: int, sequence_parallel: bool
) -> None:
    """Set the attributes by which megatron-core knows how a parameter is split."""
    vars(parameter).update(
        tensor_model_parallel=parallel,
        partition_dim=dimension,
        partition_stride=1,
        sequence_parallel=sequence_parallel,
    )
