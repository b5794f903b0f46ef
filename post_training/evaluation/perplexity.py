"""Cross entropy of text under a model: how well it predicts, without any questions."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from post_training.inference import forward, generation


@torch.no_grad()
def mean_loss(model: torch.nn.Module, batches: Iterable[torch.Tensor]) -> float:
    """Mean cross entropy of the next token, in nats; its exponential is the perplexity.

    A collective call with the same result on every rank. Data-parallel ranks give their own
    batches.

    Args:
        model: a GPTModel or HybridModel, built without sequence and context parallelism.
        batches: int64 [b, s] each, s at least 2, every position a token.
    """
    core: Any = forward.unwrap(model)
    device = forward.device_of(core)
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        tokens = batch.to(device)
        labels = tokens[:, 1:].contiguous()
        losses = forward.run(core, tokens[:, :-1].contiguous(), None, labels=labels)
        if losses is not None:
            total += torch.tensor([losses.double().sum().item(), labels.numel()])
    total = forward.from_last_stage(total.to(device), (2,), torch.float64)
    _, size, group = generation.data_parallel()
    if size > 1:
        torch.distributed.all_reduce(total, group=group)
    return float(total[0] / total[1])
