"""The order in which training data is read: shuffled, and resumable from any position."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch


class Samples(Protocol):
    """Data to train on: any number of samples of the same shape, by index."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """The samples of these indices, stacked along the first dimension, on the CPU."""


@dataclass(frozen=True)
class Order:
    """Sample numbers of a run, 0, 1, 2, ... to indices of the data; each epoch in another order.

    The order depends on the seed and the size alone, not on the ranks, the batch sizes or where a
    run was interrupted.
    """

    size: int
    seed: int
    shuffle: bool = True

    def __getitem__(self, number: int) -> int:
        epoch, place = divmod(number, self.size)
        return int(_permutation(self.size, self.seed + epoch)[place]) if self.shuffle else place


@functools.lru_cache(maxsize=1)
def _permutation(size: int, seed: int) -> torch.Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def micro_batches(
    samples: Samples,
    order: Order,
    *,
    start: int,
    micro_batch: int,
    rank: int,
    ranks: int,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """Micro batches of one data-parallel rank, on the device, read ahead by a thread, without end.

    Micro batch ``m`` of an iteration holds the samples from ``m x micro_batch x ranks`` on; within
    them each rank has ``micro_batch`` in its turn.

    Args:
        start: samples that are consumed already.
        micro_batch: samples of one call to the model.
        rank, ranks: place among the data-parallel ranks.
    """
    firsts = itertools.count(start + rank * micro_batch, micro_batch * ranks)
    indices = ([order[number] for number in range(first, first + micro_batch)] for first in firsts)
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="data") as pool:
        ahead = pool.submit(samples.batch, next(indices))
        while True:
            batch = ahead.result()
            ahead = pool.submit(samples.batch, next(indices))
            yield {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
