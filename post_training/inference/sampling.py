"""Choosing the next token: greedy, or sampled with temperature, top-k and top-p.

A draw depends on the seed, the sequence and the position alone: not on the batch a sequence happens
to be in, nor on the parallel layout. So a resumed run generates the same tokens, and all
tensor-parallel ranks, which hold the same logits, choose the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch


def greedy(
    logits: torch.Tensor, sequences: Sequence[int] = (), positions: Sequence[int] = ()
) -> torch.Tensor:
    """The most probable token of each row: [b, vocabulary] -> int64 [b]."""
    return logits.argmax(dim=-1)


@dataclass(frozen=True)
class Sampler:
    """Draws from the softmax of the logits, restricted as the fields say.

    Attributes:
        temperature: logits are divided by it; 0 is greedy.
        top_k: among the k most probable tokens only; 0 for all.
        top_p: among the fewest most probable tokens whose probabilities reach this sum.
        seed: of all draws.
        names: for each sequence of the batch's owner, any text that identifies it: the same
            name, seed and position give the same draw.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    names: Sequence[str] = ()

    def __call__(
        self, logits: torch.Tensor, sequences: Sequence[int], positions: Sequence[int]
    ) -> torch.Tensor:
        """One token for each row: float32 [b, vocabulary] -> int64 [b].

        Args:
            sequences: index into ``names`` of each row.
            positions: number of tokens that each row has generated already.
        """
        if self.temperature == 0:
            return greedy(logits)
        probabilities, order = filtered(
            logits / self.temperature, top_k=self.top_k, top_p=self.top_p
        )
        draws = [
            uniform(self.seed, self.names[sequence], position)
            for sequence, position in zip(sequences, positions, strict=True)
        ]
        cumulative = probabilities.double().cumsum(dim=-1)
        wanted = torch.tensor(draws, dtype=torch.float64, device=logits.device)
        wanted = wanted.unsqueeze(-1) * cumulative[:, -1:]
        # The first token whose cumulative probability exceeds the draw; it has some of its own.
        chosen = torch.searchsorted(cumulative, wanted, right=True)
        return order.gather(-1, chosen.clamp(max=order.shape[-1] - 1)).squeeze(-1)


def filtered(
    logits: torch.Tensor, *, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities of the tokens that remain, most probable first, and which tokens these are.

    ``top_k`` and ``top_p`` (of what ``top_k`` leaves) are as of :class:`Sampler`; the most probable
    token always remains.

    Returns:
        From logits, float32 [b, vocabulary]: probabilities [b, n], 0 where ``top_p`` removes a
        token and not renormalised after that, and token ids int64 [b, n].
    """
    probabilities, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    if 0 < top_k < logits.shape[-1]:
        probabilities, order = probabilities[:, :top_k], order[:, :top_k]
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    if top_p < 1:
        before = probabilities.double().cumsum(dim=-1) - probabilities.double()
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    return probabilities, order


def uniform(seed: int, name: str, position: int) -> float:
    """A number in [0, 1) that depends on the arguments alone (BLAKE2b in counter mode)."""
    digest = hashlib.blake2b(f"{seed}\0{name}\0{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)
