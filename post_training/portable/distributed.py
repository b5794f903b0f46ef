"""Stand-ins for collectives that NCCL takes and gloo refuses.

Active only where there is no CUDA device, as those of ``cuda``.
"""

from __future__ import annotations

from typing import Any

import torch

_all_gather_into_tensor = torch.distributed.all_gather_into_tensor


def _gather_scalars(
    output_tensor: torch.Tensor, input_tensor: torch.Tensor, *args: Any, **kwargs: Any
) -> Any:
    """``all_gather_into_tensor`` that takes a 0-dimensional input of each rank as [1].

    ModelOpt gathers so the number of layers that each pipeline stage keeps
    (prune/plugins/mcore_minitron.py:187, ``drop_mcore_language_model_layers``).
    """
    if input_tensor.dim() == 0:
        input_tensor = input_tensor.unsqueeze(0)
    return _all_gather_into_tensor(output_tensor, input_tensor, *args, **kwargs)


def install() -> None:
    """Put all stand-ins in place. Call it only where there is no CUDA device."""
    torch.distributed.all_gather_into_tensor = _gather_scalars
