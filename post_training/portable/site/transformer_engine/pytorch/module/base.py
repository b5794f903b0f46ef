"""What all modules share."""

from __future__ import annotations

from typing import Any

import torch

Device = torch.device | str | int


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
