"""Constant factors of a forward pass that megatron-core's layers do not have, such as Granite's.

Forward hooks multiply where transformers does, so that weights stay as they are in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch


def attach(model: Any, multipliers: Mapping[str, float]) -> None:
    """Let ``model``, this rank's part, heed the factors; see ``Architecture.multipliers``."""
    if (factor := multipliers["embedding"]) != 1 and model.pre_process:
        rounded = bool(multipliers.get("rounded"))
        model.embedding.register_forward_hook(partial(_multiply, factor, rounded))
    if (factor := multipliers["residual"]) != 1:
        for layer in model.decoder.layers:
            layer.self_attention.register_forward_hook(partial(_multiply_first, factor))
            layer.mlp.register_forward_hook(partial(_multiply_first, factor))
    if (divisor := multipliers["logits_divisor"]) != 1 and model.post_process:
        model.output_layer.register_forward_hook(partial(_divide_first, divisor))


def _multiply(
    factor: float, rounded: bool, _module: Any, _inputs: Any, output: torch.Tensor
) -> torch.Tensor:
    return output * (torch.tensor(factor).to(output.dtype).item() if rounded else factor)


def _multiply_first(
    factor: float, _module: Any, _inputs: Any, output: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, Any]:
    result, bias = output
    return result * factor, None if bias is None else bias * factor


def _divide_first(
    divisor: float, _module: Any, _inputs: Any, output: tuple[torch.Tensor, Any]
) -> tuple[torch.Tensor, Any]:
    return output[0] / divisor, output[1]
