"""How well a model predicts text, and how far its predictions are from a reference model's.

The two models are in memory together, and each window goes through both: their logits, [batch,
length, vocabulary], exist for one batch only, on the last pipeline stage. Keeping one model's for a
later pass would take half a megabyte a token for a vocabulary of 128,000; a second copy of the
weights takes as much as 30,000 tokens of an 8B model would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from post_training.data.text_windows import Window
from post_training.inference import forward, generation
from post_training.inference.batching import alike
from post_training.inference.by_layers import LayeredModel
from post_training.models import parts

# Of two models' logits in float32 that are compared at a time, beside the models' own.
_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class TextScores:
    """Sums over the scored tokens of each window, float64 [windows]; see :func:`score`.

    Attributes:
        tokens: scored tokens.
        loss: cross entropy in nats.
        reference_loss: the reference's; like the following, None without a reference.
        divergence: KL(reference || model), in nats.
        largest: the largest divergence of a token.
        agreeing: tokens for which both models find the same token most probable.
    """

    tokens: torch.Tensor
    loss: torch.Tensor
    reference_loss: torch.Tensor | None = None
    divergence: torch.Tensor | None = None
    largest: torch.Tensor | None = None
    agreeing: torch.Tensor | None = None


@torch.inference_mode()
def score(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    windows: Sequence[Window],
    *,
    batch_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> TextScores:
    """Predict the windows' tokens; a collective call with the same result on every rank.

    Data-parallel ranks share the batches round-robin. Probabilities are of all tokens that the
    output layer has, computed in float32.

    Args:
        model: a GPTModel or HybridModel without sequence and context parallelism.
        reference: another, with the same vocabulary.
        progress: called with the number of windows done after each batch of this rank.
    """
    models = [forward.unwrap(each) for each in (model, reference) if each is not None]
    columns = 1 if reference is None else 5
    device = forward.device_of(models[0])
    found = torch.zeros(len(windows), columns, dtype=torch.float64, device=device)
    rank, size, _ = generation.data_parallel()
    for indices in list(_batches(models, windows, batch_size))[rank::size]:
        sums = _score_batch(models, [windows[i] for i in indices], device)
        rows = torch.tensor(indices, device=device)
        shape = (len(indices), columns)
        found[rows] = forward.from_last_stage(sums, shape, torch.float64)
        if progress is not None:
            progress(len(indices))
    return _of_all_ranks(found, windows)


@torch.no_grad()
def score_by_layers(
    model: LayeredModel,
    reference: LayeredModel | None,
    windows: Sequence[Window],
    *,
    batch_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> TextScores:
    """The same of models that are never whole in memory, bit for bit."""
    layered = [each for each in (model, reference) if each is not None]
    columns = 1 if reference is None else 5
    device = parts.default_device()
    found = torch.zeros(len(windows), columns, dtype=torch.float64, device=device)
    rank, size, _ = generation.data_parallel()
    mine = list(_batches([each.model for each in layered], windows, batch_size))[rank::size]
    inputs = [_padded([windows[i] for i in some], device)[0] for some in mine]
    # As ``forward.run``, which does so where logits are asked for.
    states = [each.hidden_states(inputs, inference=len(layered) > 1) for each in layered]
    ends = [each.end() for each in layered]
    for indices, *hidden in zip(mine, *states, strict=True):
        some = [windows[i] for i in indices]
        sums = _score_batch(ends, some, device, [each.to(device) for each in hidden])
        assert sums is not None  # there is one pipeline stage
        found[torch.tensor(indices, device=device)] = sums
        if progress is not None:
            progress(len(indices))
    return _of_all_ranks(found, windows)


def _of_all_ranks(found: torch.Tensor, windows: Sequence[Window]) -> TextScores:
    """The rows of all replicas, zero where another has them; a collective call."""
    _, size, group = generation.data_parallel()
    if size > 1:
        torch.distributed.all_reduce(found, group=group)
    tokens = torch.tensor([window.scored for window in windows], dtype=torch.float64)
    return TextScores(tokens, *found.cpu().unbind(dim=1))


def _batches(
    models: Sequence[Any], windows: Sequence[Window], batch_size: int
) -> Iterator[list[int]]:
    """Indices by length, longest first, so that running out of memory shows at once."""

    def length(index: int) -> int:
        return len(windows[index].tokens) - 1  # the last one is only predicted

    order = sorted(range(len(windows)), key=length, reverse=True)
    for some in alike(models, order, length):
        yield from map(list, batched(some, batch_size))


def _padded(windows: Sequence[Window], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels, int64 [b, s] each."""
    tokens = [torch.tensor(window.tokens, device=device) for window in windows]
    inputs = pad_sequence([each[:-1] for each in tokens], batch_first=True)
    return inputs, pad_sequence([each[1:] for each in tokens], batch_first=True)


def _score_batch(
    models: Sequence[Any],
    windows: Sequence[Window],
    device: torch.device,
    hidden: Sequence[torch.Tensor | None] = (None, None),
) -> torch.Tensor | None:
    """Sums of each window [b, columns] on the last pipeline stage, None on the others.

    Args:
        hidden: of each model, which its first layer is given; None: the embedded ids.
    """
    inputs, labels = _padded(windows, device)
    if len(models) == 1:
        losses = forward.run(models[0], inputs, None, labels=labels, hidden=hidden[0])
        if losses is None:
            return None
        rows = [_scored(row, window) for row, window in zip(losses, windows, strict=True)]
        return torch.stack([row.double().sum() for row in rows]).unsqueeze(1)
    logits, reference = (
        forward.run(core, inputs, None, hidden=each)
        for core, each in zip(models, hidden, strict=True)
    )
    if logits is None or reference is None:
        return None
    sums = [
        _compare(*(_scored(each, window) for each in row))
        for *row, window in zip(logits, reference, labels, windows, strict=True)
    ]
    return torch.stack(sums)


def _scored(row: torch.Tensor, window: Window) -> torch.Tensor:
    """The part of a row of predictions, or of what is to be predicted, that counts."""
    end = len(window.tokens) - 1
    return row[end - window.scored : end]


def _compare(logits: torch.Tensor, reference: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The five sums of :class:`TextScores` over [n, vocabulary], float64 [5]."""
    total = torch.zeros(5, dtype=torch.float64, device=logits.device)
    rows = max(1, _ELEMENTS // logits.shape[-1])
    for ours, theirs, right in zip(
        logits.split(rows), reference.split(rows), labels.split(rows), strict=True
    ):
        q, p = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
        divergence = (p.exp() * (p - q)).sum(-1)
        total[0] -= q.gather(1, right.unsqueeze(1)).double().sum()
        total[1] -= p.gather(1, right.unsqueeze(1)).double().sum()
        total[2] += divergence.double().sum()
        total[3] = torch.maximum(total[3], divergence.max().double())
        total[4] += (q.argmax(-1) == p.argmax(-1)).sum()
    return total
