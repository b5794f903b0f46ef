"""How far a draft's distribution is from the target's, over a vocabulary split among ranks.

The loss of a position is the cross entropy of the draft under the target's distribution: the
Kullback-Leibler divergence up to the target's own entropy, which is what ModelOpt trains EAGLE-3
with (``logits_kld_loss``). There every rank gathers both [s, b, vocabulary] tensors; here each rank
keeps its part. Long sequences go in chunks, and of a chunk the gradient with respect to the draft's
states is computed at once, with the loss: of a whole sequence's logits only the target's are ever
held, in their own type, and those only while they are small (``KEPT_BYTES``). As in fused linear
cross entropies (Hsu et al. 2024, arXiv:2410.10989), but by PyTorch's own operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)

# Logits of one chunk on a rank: 1.5 * 2^26 floats are 400 MB; three or four such tensors are held.
CHUNK_ELEMENTS = 3 << 25
# The target's logits are kept for all steps up to this size on a rank, and else computed again.
KEPT_BYTES = 4 << 30


def chunks(length: int, batch: int, columns: int) -> list[tuple[int, int]]:
    """Positions [start, stop) whose logits are computed together."""
    size = max(16, CHUNK_ELEMENTS // (batch * columns))
    # Matrix products are fastest with whole tiles of rows.
    size -= size % 128 if size > 128 else 0
    return [(start, min(start + size, length)) for start in range(0, length, size)]


class Teacher:
    """The target's distribution over the draft's vocabulary, by position.

    Args:
        logits: float or bfloat16 [stop - start, b, columns] of positions [start, stop): this
            rank's part of the draft's vocabulary.
        length: positions that there are in all.
    """

    def __init__(self, logits: Callable[[int, int], torch.Tensor], length: int) -> None:
        self._logits = logits
        self._length = length
        self._kept: dict[int, torch.Tensor] = {}
        self._argmax: dict[int, torch.Tensor] = {}

    @torch.no_grad()
    def __call__(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities [stop - start, b, columns] in float32, and their argmax [.., b].

        Every step must ask in the same chunks.
        """
        logits = self._kept.get(start)
        if logits is None:
            logits = self._logits(start, stop)
            if logits.element_size() * logits[0].numel() * self._length <= KEPT_BYTES:
                self._kept[start] = logits
        if start not in self._argmax:
            self._argmax[start] = argmax(logits)
        return log_softmax(logits).exp_(), self._argmax[start]


class WeightedLoss(torch.autograd.Function):
    """The weighted sum of the positions' losses, and that of right guesses: two float32 scalars.

    A guess is right if the draft's argmax is the target's. Gradients are made in the forward pass.

    Args:
        student: from hidden states [n, b, h] to this rank's part of the logits.
        teacher: the target's distributions for the same positions.
        weight: of each position, float32 [s, b].
        spans: chunks that cover 0 .. s.
        hidden: the draft's last states [s, b, h].
        parameters: what ``student`` is to be trained in, if anything.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: Callable[[torch.Tensor], torch.Tensor],
        teacher: Teacher,
        weight: torch.Tensor,
        spans: list[tuple[int, int]],
        hidden: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        trains = hidden.requires_grad
        gradients = [torch.zeros_like(each) for each in (hidden, *parameters) if trains]
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        right = torch.zeros_like(total)
        for start, stop in spans:
            probabilities, best = teacher(start, stop)
            with torch.set_grad_enabled(trains):
                states = hidden[start:stop].detach().requires_grad_(trains)
                logits = student(states)
                rows = torch.linalg.vecdot(probabilities, log_softmax(logits))
                # Over all ranks; each gets its part's gradient.
                loss = reduce_from_tensor_model_parallel_region(-(rows * weight[start:stop]).sum())
            del probabilities
            if trains:
                found = torch.autograd.grad(loss, (states, *parameters))
                gradients[0][start:stop] = found[0]
                for gradient, part in zip(gradients[1:], found[1:], strict=True):
                    gradient += part
            total += loss.detach()
            right += ((argmax(logits.detach()) == best) * weight[start:stop]).sum()
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(right)
        return total, right

    @staticmethod
    def backward(ctx: Any, *incoming: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, None, None, *(incoming[0] * each for each in ctx.saved_tensors))


def log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """This rank's part of the logarithm of the softmax over all ranks, in float32."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return torch.log_softmax(logits, dim=-1, dtype=torch.float32)
    logits = logits.float()
    largest = _reduce(logits.detach().amax(dim=-1), torch.distributed.ReduceOp.MAX)
    shifted = logits - largest.unsqueeze(-1)
    total = reduce_from_tensor_model_parallel_region(shifted.exp().sum(-1))
    # Every rank's part depends on the total: the copy sums their gradients.
    normaliser: torch.Tensor = copy_to_tensor_model_parallel_region(total.log())
    return shifted - normaliser.unsqueeze(-1)


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """Index of the largest entry along a dimension split over ranks; the first of equals."""
    if parallel_state.get_tensor_model_parallel_world_size() == 1:
        return logits.argmax(dim=-1)
    value, index = logits.max(dim=-1)
    index = index + parallel_state.get_tensor_model_parallel_rank() * logits.shape[-1]
    largest = _reduce(value.clone(), torch.distributed.ReduceOp.MAX)
    index = torch.where(value == largest, index, torch.iinfo(index.dtype).max)
    return _reduce(index, torch.distributed.ReduceOp.MIN)


def _reduce(tensor: torch.Tensor, operation: Any) -> torch.Tensor:
    """``tensor``, reduced in place over the tensor-parallel ranks."""
    group = parallel_state.get_tensor_model_parallel_group()
    torch.distributed.all_reduce(tensor, op=operation, group=group)
    return tensor
