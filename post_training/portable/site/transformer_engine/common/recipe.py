"""Recipes of low-precision training: asking for one is an error, since nothing here computes it.

megatron-core looks a recipe up where ``--fp8`` or ``--fp4`` is on (fp8_utils.py:724-748,
fp4_utils.py:224). That is the first thing it asks of Transformer Engine then, so the refusal
comes from here.
"""

from __future__ import annotations

from typing import NoReturn

NO_LOW_PRECISION = (
    "the pure-PyTorch stand-in for Transformer Engine does not compute in FP8 or FP4: install "
    "transformer_engine, or quantize with ModelOpt"
)


class DelayedScaling:
    """Base class of a class that extensions/transformer_engine.py:3220 defines at its import."""


def __getattr__(name: str) -> NoReturn:
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    raise NotImplementedError(NO_LOW_PRECISION)
