"""The linear layers of a model that patterns of ``--leave-out`` match."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from post_training.distributed.collectives import from_all_ranks
from post_training.quantization import layer_names
from post_training.quantization.layer_names import global_name
from post_training.quantization.quantizers import is_linear


def local_names(model: torch.nn.Module, patterns: Sequence[str]) -> list[str]:
    """This rank's names of the linears that patterns of ``--leave-out`` match; a collective call.

    Raises:
        UsageError: on every rank, for a pattern that matches none, or a part of a layer's experts.
    """
    if not patterns:
        return []
    names = {
        global_name(model, name): name
        for name, module in model.named_modules()
        if is_linear(module)
    }
    layer_names.check(patterns, sorted(set().union(*from_all_ranks({*names, "output_layer"}))))
    return [name for whole, name in names.items() if layer_names.matching(whole, patterns)]
