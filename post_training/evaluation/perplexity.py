"""Cross entropy of text under a model: how well it predicts, without any questions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from post_training.inference import forward, generation
from post_training.inference.batching import Batching


@torch.no_grad()
def mean_loss(model: torch.nn.Module, rows: torch.Tensor, batching: Batching) -> float:
    """Mean cross entropy of the next token, in nats; its exponential is the perplexity.

    A collective call with the same result on every rank. Data-parallel ranks give their own
    rows.

    Args:
        model: a GPTModel or HybridModel, built without sequence and context parallelism.
        rows: int64 [n, s], s at least 2, every position a token.
    """
    core: Any = forward.unwrap(model)
    device = forward.device_of(core)
    total = torch.zeros(2, dtype=torch.float64)

    def summed(some: Sequence[int]) -> torch.Tensor | None:
        tokens = rows[some[0] : some[-1] + 1].to(device)
        labels = tokens[:, 1:].contiguous()
        losses = forward.run(core, tokens[:, :-1].contiguous(), None, labels=labels)
        return None if losses is None else losses.double().sum(1).cpu()

    length = rows.shape[1]
    for _, sums in batching.over(core, range(len(rows)), summed, positions=lambda _: length):
        for loss in () if sums is None else sums:  # in order: the batch's size changes no rounding
            total += torch.tensor([loss.item(), length - 1])
    total = forward.from_last_stage(total.to(device), (2,), torch.float64)
    _, size, group = generation.data_parallel()
    if size > 1:
        torch.distributed.all_reduce(total, group=group)
    return float(total[0] / total[1])
