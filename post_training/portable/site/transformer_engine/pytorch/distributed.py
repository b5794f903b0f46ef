"""Two names that megatron-core imports."""

from __future__ import annotations

from typing import Any, NoReturn

from transformer_engine.common.recipe import NO_LOW_PRECISION


class CudaRNGStatesTracker:
    """Base class of a class that extensions/transformer_engine.py:3256 defines at its import.

    megatron-core makes one only for callers that ask tensor_parallel/random.py for Transformer
    Engine's tracker; this repository uses megatron-core's own.
    """


def activation_recompute_forward(*args: Any, **kwargs: Any) -> NoReturn:
    """Marks FP8 recomputation. tensor_parallel/random.py:86 catches no ImportError, only a missing
    module, and calls it (:696, :788) where FP8 computation is on."""
    raise NotImplementedError(NO_LOW_PRECISION)
