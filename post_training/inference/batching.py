"""How many sequences go through a model at a time: a given number, or as many as memory takes.

With ``auto`` the first passes are small and are measured. What a position took then, and the
memory that is free, give the size of the following ones; nothing is computed for the measurement
alone. If memory runs out all the same, the pass is halved and repeated, and what was computed
before it stays.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from post_training.common import report
from post_training.common.errors import UsageError
from post_training.config.batch_size import AUTO, BatchSize
from post_training.distributed import memory
from post_training.distributed.collectives import from_all_ranks
from post_training.inference import forward

logger = logging.getLogger("post_training")

# Tokens computed in a pass at most: more are not faster, and need memory (benchmarks/README.md).
_MOST_TOKENS = {"cuda": 32_768, "cpu": 2_048}
_MOST_SEQUENCES = 256
# Of the first two passes, which are measured.
_MEASURED_TOKENS = (1_024, 8_192)
# Of the free memory that a pass may take. Ranks that compute one sequence together cannot recover
# from a lack of memory, so they stay further away from it.
_ALONE, _TOGETHER = 0.8, 0.5
# Of a position on the CPU, where nothing is measured: float32 values by the layer's widths.
_WIDTHS = 16


@dataclass
class Batching:
    """Cuts sequences into passes; one instance learns for all passes through a model.

    Attributes:
        asked: sequences a pass, or ``auto``.
        flag: that says so, for messages.
        largest: sequences of the largest pass so far.
        halved: how often memory ran out.
    """

    asked: BatchSize
    flag: str
    largest: int = 0
    halved: int = 0
    _passes: int = 0
    _positions: float = 0.0  # that memory takes in a pass; 0: not known yet
    _ceiling: float = math.inf  # of the same, since memory ran out

    @property
    def is_given(self) -> bool:
        """Whether it is a number that the user has given."""
        return isinstance(self.asked, int)

    @property
    def fixed(self) -> int:
        """Sequences a pass where every pass must have the same number."""
        return self.asked if isinstance(self.asked, int) else 1

    def over[T, R](
        self,
        model: torch.nn.Module,
        items: Sequence[T],
        compute: Callable[[Sequence[T]], R],
        *,
        positions: Callable[[T], int],
        tokens: Callable[[T], int] | None = None,
        undo: Callable[[], Callable[[], None]] | None = None,
    ) -> Iterator[tuple[Sequence[T], R]]:
        """Run ``compute`` over consecutive items; yields the items of each pass and its result.

        The ranks of one replica call it alike, with the same items.

        Args:
            compute: one pass; called again with fewer items if it ran out of memory.
            positions: of an item, that take memory: cached ones too.
            tokens: of an item, that are computed; by default all positions.
            undo: called before each pass; what it returns takes back what a failed pass recorded.

        Raises:
            UsageError: if memory does not take a given number, or a single sequence.
        """
        core = forward.unwrap(model)
        device = forward.device_of(core)
        start = 0
        while start < len(items):
            next_ones = items[start : start + (self.fixed if self.is_given else _MOST_SEQUENCES)]
            some = next_ones[: self._count(core, next_ones, positions, tokens or positions)]
            take_back = undo() if undo else None
            exhausted = False
            with memory.measuring(device) as peak:
                try:
                    result = compute(some)
                except RuntimeError as error:
                    if not memory.is_exhausted(error):
                        raise
                    exhausted = True
            held = len(some) * max(map(positions, some))
            if exhausted:
                # Not in the handler: the error holds the tensors of the pass that failed.
                if take_back is not None:
                    take_back()
                self._halve(len(some), held, device)
                continue
            self.largest = max(self.largest, len(some))
            if not self.is_given and self._passes < len(_MEASURED_TOKENS):
                self._learn(device, peak.bytes, held)
            self._passes += 1
            start += len(some)
            yield some, result

    def describe(self) -> str:
        """For a log: the size of the largest pass."""
        chosen = "" if self.is_given else f" ({self.flag} {AUTO})"
        return f"up to {self.largest} at a time{chosen}"

    def _count[T](
        self,
        core: Any,
        items: Sequence[T],
        positions: Callable[[T], int],
        tokens: Callable[[T], int],
    ) -> int:
        """How many of the items the next pass takes."""
        if self.is_given:
            return len(items)
        device = forward.device_of(core)
        most_tokens = _MOST_TOKENS[device.type]
        if self._passes < len(_MEASURED_TOKENS):
            most_tokens = min(most_tokens, _MEASURED_TOKENS[self._passes])
        if not self._positions and device.type == "cpu":
            self._positions = self._agreed(_share() * memory.free(device) / _bytes_on_cpu(core))
        longest = widest = count = 0
        for item in items:
            longest, widest = max(longest, tokens(item)), max(widest, positions(item))
            most = min(self._positions or math.inf, self._ceiling)
            fits = (count + 1) * widest <= most
            if count and not (fits and (count + 1) * longest <= most_tokens):
                break
            count += 1
        return count

    def _learn(self, device: torch.device, peak: int, positions: int) -> None:
        """From a pass of so many positions, how many the memory takes."""
        if device.type == "cpu":
            return
        left, each = memory.free(device), max(1, peak // positions)
        self._positions = self._agreed(_share() * left / each)
        logger.debug(
            "a position took %s, %s are free: up to %d positions a pass",
            *(report.number_of_bytes(each), report.number_of_bytes(left), int(self._positions)),
        )

    def _halve(self, count: int, positions: int, device: torch.device) -> None:
        """Memory ran out in a pass of ``count`` sequences."""
        self.halved += 1
        together = _ranks_together() > 1
        if self.is_given or count == 1 or together:
            what = f"{count} sequences" if count > 1 else "a single sequence"
            shared = ", and the ranks that compute them together cannot start again"
            raise UsageError(
                f"{self.flag} {self.asked}",
                f"memory does not take {what} at a time{shared * together}",
                f"give {self.flag} {count // 2}" if count > 1 else "use more ranks (TP, PP)",
            )
        if device.type == "cuda":
            torch.cuda.empty_cache()
        self._ceiling = positions / 2
        logger.warning(
            "out of memory with %d sequences at a time: halved, and what was computed before stays",
            count,
        )

    def _agreed(self, positions: float) -> float:
        """The least of the ranks that compute the same sequences; a collective call of these."""
        return min(from_all_ranks(positions, _group()))


def _group() -> Any:
    """The ranks that compute the same sequences together."""
    from megatron.core import parallel_state as state

    if state.get_expert_model_parallel_world_size() > 1:
        return state.get_expert_tensor_model_pipeline_parallel_group()
    return state.get_model_parallel_group()


def _ranks_together() -> int:
    return torch.distributed.get_world_size(_group())


def _share() -> float:
    return _TOGETHER if _ranks_together() > 1 else _ALONE


def _bytes_on_cpu(core: Any) -> int:
    """An estimate for a position in one layer, with its keys and values in all layers."""
    config = core.config
    active = (config.moe_router_topk or 1) if config.num_moe_experts else 1
    widths = config.hidden_size + active * (config.ffn_hidden_size or 0)
    cached = 2 * config.num_layers * (config.num_query_groups or 1) * (config.kv_channels or 1)
    return 4 * (_WIDTHS * widths + cached)


def rotates_by_length(core: Any) -> bool:
    """Whether a token's rotation depends on how long its text is (``models/rotary.py``)."""
    return bool(getattr(getattr(core, "rotary_pos_emb", None), "depends_on_length", False))


def alike[T](
    models: Sequence[torch.nn.Module], items: Sequence[T], length: Callable[[T], int]
) -> Iterator[list[T]]:
    """Consecutive items that may be padded to one length: it rotates none of them otherwise.

    Args:
        length: of an item's text.
    """
    cores = [forward.unwrap(each) for each in models]
    kinds = [each.rotary_pos_emb.kind_of for each in cores if rotates_by_length(each)]

    def key(item: T) -> list[int]:
        return [kind(length(item)) for kind in kinds]

    return (list(group) for _, group in itertools.groupby(items, key))
