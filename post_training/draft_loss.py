"""How far a draft's distribution is from the target's, over a vocabulary split among ranks.

The loss of a position is the cross entropy of the draft under the target's distribution: the
Kullback-Leibler divergence up to the target's own entropy, which is what ModelOpt trains EAGLE-3
with (``logits_kld_loss``). There every rank gathers both [s, b, vocabulary] tensors; here each rank
keeps its part, and long sequences go in chunks that are computed again in the backward pass, so
that logits take no more memory than one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

# Logits of one chunk on a rank: 2^26 floats are 256 MB.
CHUNK_ELEMENTS = 1 << 26

Logits = Callable[[int, int], torch.Tensor]


def chunks(length: int, batch: int, columns: int) -> list[tuple[int, int]]:
    """Positions [start, stop) whose logits are computed together."""
    size = max(16, CHUNK_ELEMENTS // (batch * columns))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


class Teacher:
    """The target's distribution over the draft's vocabulary, by position.

    Args:
        logits: float or bfloat16 [stop - start, b, columns] of positions [start, stop): this
            rank's part of the draft's vocabulary.
        spans: the chunks in which it will be asked.
    """

    def __init__(self, logits: Logits, spans: list[tuple[int, int]]) -> None:
        self._logits = logits
        self._kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        # What fits into a chunk is computed once for all steps.
        self._keep = len(spans) == 1

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities [stop - start, b, columns] in float32, and the likeliest [.., b]."""
        if (start, stop) in self._kept:
            return self._kept[start, stop]
        # A copy: whatever is done with it, the target's logits stay as they are.
        logits = self._logits(start, stop).to(torch.float32, copy=True)
        found = _softmax(logits)[0], likeliest(logits)
        if self._keep:
            self._kept[start, stop] = found
        return found


def losses(
    student: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    teacher: Teacher,
    spans: list[tuple[int, int]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each position, and whether the draft's likeliest token is the target's.

    Args:
        student: from hidden states [n, b, h] to this rank's part of the logits.
        hidden: the draft's last states [s, b, h].
        teacher: the target's distributions for the same positions.
        spans: chunks that cover 0 .. s.

    Returns:
        float32 [s, b] and bool [s, b].
    """

    def part(states: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        logits = student(states).float()
        probabilities, best = teacher(start, stop)
        loss: Any = _SoftCrossEntropy.apply(logits, probabilities)
        with torch.no_grad():
            return loss, likeliest(logits) == best

    found = []
    for start, stop in spans:
        states = hidden[start:stop]
        if len(spans) == 1:
            found.append(part(states, start, stop))
        else:
            found.append(
                checkpoint(part, states, start, stop, use_reentrant=False, preserve_rng_state=False)
            )
    return torch.cat([loss for loss, _ in found]), torch.cat([right for _, right in found])


class _SoftCrossEntropy(torch.autograd.Function):
    """-sum(p log softmax(x)) along the last dimension, which is split over ranks."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        softmax, log_normaliser = _softmax(logits)
        expected = (probabilities * logits).sum(-1)
        ctx.save_for_backward(softmax, probabilities)
        return log_normaliser - _reduced(expected)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        softmax, probabilities = ctx.saved_tensors
        return (softmax - probabilities) * gradients[0].unsqueeze(-1), None


def _softmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's part of the softmax over all ranks, and the logarithm of its normaliser."""
    largest = _reduced(logits.max(dim=-1).values, torch.distributed.ReduceOp.MAX)
    exponential = (logits - largest.unsqueeze(-1)).exp()
    normaliser = _reduced(exponential.sum(-1))
    return exponential / normaliser.unsqueeze(-1), largest + normaliser.log()


@torch.no_grad()
def likeliest(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest entry along a dimension split over ranks; the first of equals."""
    from megatron.core import parallel_state

    value, index = logits.max(dim=-1)
    index = index + parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    largest = _reduced(value, torch.distributed.ReduceOp.MAX)
    index = torch.where(value == largest, index, torch.iinfo(index.dtype).max)
    return _reduced(index, torch.distributed.ReduceOp.MIN)


def _reduced(tensor: torch.Tensor, operation: Any = None) -> torch.Tensor:
    """A copy, reduced (summed by default) over the tensor-parallel ranks."""
    from megatron.core import parallel_state

    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return tensor
    tensor = tensor.clone()
    torch.distributed.all_reduce(
        tensor,
        op=operation or torch.distributed.ReduceOp.SUM,
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    return tensor
