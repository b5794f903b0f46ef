"""The task of predicting the next token: fine-tuning, also of a quantized model.

The quantizers of a quantized model round in the forward pass and pass gradients on (within their
range), so training it is quantization-aware. Their scales stay as they were calibrated.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from post_training.training.task import Loss, LossFunction, Task


def task() -> Task:
    """Cross entropy of the tokens that count, in nats."""
    return Task(
        forward_step=_forward_step,
        metric_names=("cross_entropy",),
        set_mode=lambda model: model.train(),
        adjust_tensor_shapes=None,
    )


def targets(batch: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of each position: itself, the token that it predicts and how much that counts, all [b, s].

    Args:
        batch: ``input_ids`` int64 [b, s], ``loss_mask`` [b, s] (1 where a token counts).
    """
    tokens = batch["input_ids"]
    # Position t predicts token t + 1; the last one predicts nothing that is known.
    labels = torch.nn.functional.pad(tokens[:, 1:], (0, 1))
    weight = torch.nn.functional.pad(batch["loss_mask"][:, 1:], (0, 1)).float()
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return positions, labels, weight


def _forward_step(model: Any, batch: Mapping[str, Any]) -> tuple[torch.Tensor, LossFunction]:
    """One micro batch through this pipeline stage."""
    positions, labels, weight = targets(batch)
    output = model(batch["input_ids"], positions, None, labels=labels)

    def loss(output: torch.Tensor) -> Loss:
        count, total = weight.sum(), (output.float() * weight).sum()
        return total, count, {"cross_entropy": torch.stack([total.detach(), count])}

    return output, loss
