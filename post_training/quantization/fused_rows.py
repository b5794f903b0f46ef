"""Which rows of a Megatron linear layer are which matrix of the Hugging Face files."""

from __future__ import annotations

from typing import Any

import torch


def matrices(name: str, module: Any) -> list[torch.Tensor]:
    """This rank's rows of each matrix that the layer holds, in the files' order; int64 [rows] each.

    Over the tensor-parallel ranks of a layer that is split by rows, a matrix is the ranks' rows
    one after the other.

    Args:
        name: of the module; its last part says what the layer computes.
    """
    weight: Any = module._parameters["weight"]
    count = getattr(weight, "metadata", {}).get("shape", weight.shape)[0]
    rows = torch.arange(count, device=weight.device)
    config: Any = getattr(module, "config", None)
    match name.rpartition(".")[2]:
        case "linear_qkv":
            return _queries_keys_values(rows, config)
        case "linear_fc1" if config.gated_linear_unit:
            return list(rows.chunk(2))
    return [rows]


def _queries_keys_values(rows: torch.Tensor, config: Any) -> list[torch.Tensor]:
    """Of rows that hold each group's queries, its key and its value, a head each.

    Queries with a gate are followed by as many gates; the files have each head's beside it.
    """
    queries = config.num_attention_heads // config.num_query_groups
    gates = queries if getattr(config, "attention_output_gate", False) else 0
    heads = rows.reshape(-1, queries + gates + 2, config.kv_channels)
    *of_queries, keys, values = heads.split((*[queries] * (1 + bool(gates)), 1, 1), dim=1)
    together = torch.cat([each.unsqueeze(2) for each in of_queries], dim=2)
    return [part.flatten() for part in (together, keys, values)]
