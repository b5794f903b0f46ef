"""What a layer with a recurrence keeps of the tokens so far; others keep keys and values."""

from __future__ import annotations

from typing import NamedTuple

import torch


class RecurrentStates(NamedTuple):
    """Of a layer, one of each sequence: keys and values are one of each position.

    Attributes:
        convolution: [b, channels, width], the last inputs.
        recurrence: float32 [b, h, ...].
    """

    convolution: torch.Tensor
    recurrence: torch.Tensor
