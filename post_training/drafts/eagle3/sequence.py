"""Sequence parallelism of a draft in training: each tensor-parallel rank has a part of the rows.

Target and draft compute on parts [s / TP, b, h]; the loss, and the shift of rows from one step of
training-time test to the next, need whole sequences. Without it every function here returns what
it is given.
"""

from __future__ import annotations

from typing import Any

import torch


def whole(core: Any, states: torch.Tensor) -> torch.Tensor:
    """All rows [s, b, h]. Ranks must use them in the same way; each gets its part's gradient."""
    if not core.config.sequence_parallel:
        return states
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    found: torch.Tensor = gather_from_sequence_parallel_region(
        states, tensor_parallel_output_grad=False
    )
    return found


def part(core: Any, states: torch.Tensor) -> torch.Tensor:
    """This rank's rows [s / TP, b, h] of states without gradients."""
    if not core.config.sequence_parallel:
        return states
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    found: torch.Tensor = scatter_to_sequence_parallel_region(states)
    return found


def give_whole_to_output_layers(core: Any) -> None:
    """Let the layers that make logits take whole sequences, which the loss reads in chunks."""
    for layer in (core.output_layer, getattr(core.eagle_module, "eagle_output_layer", None)):
        if layer is not None:
            layer.sequence_parallel = False
