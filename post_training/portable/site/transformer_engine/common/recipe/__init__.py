"""Recipes of low-precision training. They can be built and compared; nothing here computes them."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

__all__ = [
    "DelayedScaling",
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "Format",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
    "Recipe",
]


class Format(enum.Enum):
    """Number format of the forward and the backward pass."""

    E4M3 = "e4m3"
    E5M2 = "e5m2"
    HYBRID = "hybrid"
    E2M1 = "e2m1"


class Recipe:
    """Base of all recipes."""

    def delayed(self) -> bool:
        return isinstance(self, DelayedScaling)

    def mxfp8(self) -> bool:
        return isinstance(self, MXFP8BlockScaling)

    def float8_current_scaling(self) -> bool:
        return isinstance(self, Float8CurrentScaling)

    def float8_block_scaling(self) -> bool:
        return isinstance(self, Float8BlockScaling)

    def nvfp4(self) -> bool:
        return isinstance(self, NVFP4BlockScaling)


class DelayedScaling(Recipe):
    """Scales from a history of maxima."""

    def __init__(
        self,
        margin: int = 0,
        fp8_format: Format = Format.HYBRID,
        amax_history_len: int = 1024,
        amax_compute_algo: Any = "max",
        **options: Any,
    ) -> None:
        self.margin = margin
        self.fp8_format = fp8_format
        self.amax_history_len = amax_history_len
        self.amax_compute_algo = amax_compute_algo
        self.options = options


@dataclass
class Float8CurrentScaling(Recipe):
    """One scale per tensor, from the tensor itself."""

    fp8_format: Format = Format.HYBRID


@dataclass
class MXFP8BlockScaling(Recipe):
    """One power-of-two scale per 32 values."""

    fp8_format: Format = Format.E4M3


@dataclass
class Float8BlockScaling(Recipe):
    """One scale per 128 or 128x128 values."""

    fp8_format: Format = Format.E4M3


@dataclass
class NVFP4BlockScaling(Recipe):
    """One E4M3 scale per 16 values and one per tensor."""

    fp4_format: Format = Format.E2M1
