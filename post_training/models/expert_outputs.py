"""Experts whose output is multiplied by the router's probability, as transformers and engines do.

megatron-core multiplies the input of an expert's second linear layer. The product is the same, but
the maxima of that input are not: a scale calibrated on them clips what an engine sees.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.experts import SequentialMLP


def weigh(model: torch.nn.Module) -> None:
    """Multiply what experts give, not the input of their second layer; changes ``model``."""
    for module in model.modules():
        if isinstance(module, SequentialMLP):
            for expert in module.local_experts:
                expert.register_forward_pre_hook(_keep_probabilities)
                expert.register_forward_hook(_weigh)


def _keep_probabilities(expert: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
    hidden, expert.kept_probabilities = arguments
    return (hidden,)


def _weigh(expert: Any, _arguments: Any, output: tuple[Any, Any]) -> tuple[torch.Tensor, None]:
    result, bias = output
    probabilities, expert.kept_probabilities = expert.kept_probabilities, None
    if bias is not None:
        result = result + bias
    return (result * probabilities.unsqueeze(-1)).to(result.dtype), None
