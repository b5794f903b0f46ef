"""What is trained: the interface between the training loop and the stages' losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Sum of the loss over its tokens, their number (int), and of each metric [sum, count].
Loss = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
LossFunction = Callable[[torch.Tensor], Loss]


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        forward_step: from this rank's model and a micro batch to the stage's output and, for the
            last pipeline stage, a function from that output to the :data:`Loss`. The loss is a sum
            over tokens: the loop divides by all tokens of the iteration, so that the result does
            not depend on how it is cut into micro batches.
        metric_names: names in the third part of the loss, the same on every rank; the last
            pipeline stage gives each as a tensor [sum, count].
        set_mode: puts the model into the mode in which it is trained and evaluated.
        adjust_tensor_shapes: as megatron-core's schedules take it, where stages exchange more than
            hidden states.
    """

    forward_step: Callable[[Any, Mapping[str, Any]], tuple[Any, LossFunction]]
    metric_names: tuple[str, ...]
    set_mode: Callable[[Any], None]
    adjust_tensor_shapes: Callable[..., Any] | None
