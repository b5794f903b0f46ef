"""Whole conversations packed into sequences of one length, and read back from disk. No torch.

The rest of a sequence is padding with a loss mask of 0. A conversation longer than a sequence is
truncated. Conversations in one sequence attend to each other, as in Megatron-LM's packing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from post_training.data.assistant_mask import Tokens

if TYPE_CHECKING:
    import numpy
    import torch

PAD = 0
_OPEN = 64  # sequences that are filled at the same time


class Packer:
    """Fills sequences of ``length`` tokens with whole conversations."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.full: list[tuple[list[int], list[bool]]] = []
        self.cut = 0
        self.dropped = 0
        self._open: list[tuple[list[int], list[bool]]] = []

    def add(self, tokens: Tokens) -> None:
        """Put a conversation into the fullest open sequence that has room for it."""
        if len(tokens.ids) > self.length:
            self.cut += 1
        ids, mask = tokens.ids[: self.length], tokens.mask[: self.length]
        if not any(mask[2:]):  # no position predicts the first two tokens
            self.dropped += 1
            return
        fitting = [row for row in self._open if len(row[0]) + len(ids) <= self.length]
        if fitting:
            row = max(fitting, key=lambda each: len(each[0]))
            row[0].extend(ids)
            row[1].extend(mask)
        else:
            row = (list(ids), list(mask))
            self._open.append(row)
        if len(row[0]) == self.length:
            self._close(row)
        elif len(self._open) > _OPEN:
            self._close(max(self._open, key=lambda each: len(each[0])))

    def finish(self) -> None:
        """Close all open sequences."""
        while self._open:
            self._close(self._open[0])

    def _close(self, row: tuple[list[int], list[bool]]) -> None:
        self._open = [each for each in self._open if each is not row]
        self.full.append(row)

    def arrays(self) -> tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]:
        """Token ids int32 [n, length] and mask uint8 [n, length], padded at the end."""
        import numpy

        ids = numpy.full((len(self.full), self.length), PAD, dtype=numpy.int32)
        mask = numpy.zeros((len(self.full), self.length), dtype=numpy.uint8)
        for i, (row, flags) in enumerate(self.full):
            ids[i, : len(row)] = row
            mask[i, : len(flags)] = flags
        return ids, mask


@dataclass(frozen=True)
class PackedConversations:
    """Packed sequences in memory-mapped files; the :class:`Samples` of online training.

    Attributes:
        ids: int32 [n, s].
        mask: uint8 [n, s], 1 where a token is an answer's.
    """

    ids: numpy.ndarray[Any, Any]
    mask: numpy.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """``input_ids`` int64 [b, s] and ``loss_mask`` uint8 [b, s]."""
        import torch

        chosen = list(indices)
        return {
            "input_ids": torch.from_numpy(self.ids[chosen].astype("int64")),
            "loss_mask": torch.from_numpy(self.mask[chosen].copy()),
        }

    def tokens(self) -> tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]:
        """All token ids and masks, [n, s] each."""
        return self.ids, self.mask
