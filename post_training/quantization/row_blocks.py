"""One scale for a block of rows and columns of each matrix of the Hugging Face files.

Blocks of ModelOpt's are cut out of Megatron's matrices, where they would hold rows of k and of v.
So it calibrates a maximum for the columns of a block in each row, and the rows that an engine's
block holds get the largest of theirs here, before anything is scored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from post_training.quantization import fused_rows, quantizers
from post_training.quantization.formats import registry as formats


@torch.no_grad()
def share_maxima(model: torch.nn.Module) -> None:
    """Give the rows of a block one maximum; a collective call of the tensor-parallel ranks."""
    for name, module in model.named_modules():
        form = quantizers.linear_of(module)
        found = formats.WEIGHTS.get(form.weight) if form else None
        if found is None or found.block_rows == 1:
            continue
        quantizer: Any = module.weight_quantizer
        weight: Any = module.weight
        maxima = quantizer._amax.view(weight.shape[0], -1)
        for rows in fused_rows.matrices(name, module):
            maxima[rows] = _shared(maxima[rows], found.block_rows, module)


def _shared(mine: torch.Tensor, size: int, module: Any) -> torch.Tensor:
    """The largest of each column in blocks of ``size`` rows, for each row, [rows, columns].

    Args:
        mine: this rank's rows of a matrix.
    """
    whole, first = mine, 0
    if _is_split_by_rows(module):
        parts = [torch.empty_like(mine) for _ in range(module.tp_group.size())]
        torch.distributed.all_gather(parts, mine.contiguous(), group=module.tp_group)
        whole, first = torch.cat(parts), module.tp_group.rank() * len(mine)
    missing = -len(whole) % size
    blocks = functional.pad(whole, (0, 0, 0, missing)).unflatten(0, (-1, size))
    return blocks.amax(1).repeat_interleave(size, 0)[first : first + len(mine)]


def _is_split_by_rows(module: Any) -> bool:
    weight = module._parameters["weight"]
    is_split = getattr(weight, "tensor_model_parallel", False) and weight.partition_dim == 0
    return is_split and module.tp_group.size() > 1
