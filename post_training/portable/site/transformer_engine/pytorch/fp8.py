"""The FP8 state of the process: there is none, and asking for FP8 computation is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

__all__ = ["FP8GlobalStateManager", "check_fp8_support", "fp8_autocast", "fp8_model_init"]

_NO_FP8 = (
    "the pure-PyTorch stand-in for Transformer Engine does not compute in FP8 or FP4: install "
    "transformer_engine, or quantize with ModelOpt"
)


def check_fp8_support() -> tuple[bool, str]:
    """(whether FP8 computation is available, why not)."""
    return False, _NO_FP8


class FP8GlobalStateManager:
    """Answers the questions that callers ask about FP8 autocasting."""

    @classmethod
    def reset(cls) -> None:
        pass

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False

    @classmethod
    def is_fp8_calibration(cls) -> bool:
        return False

    @classmethod
    def with_fp8_parameters(cls) -> bool:
        return False

    @classmethod
    def is_first_fp8_module(cls) -> bool:
        return False

    @classmethod
    def get_fp8_recipe(cls) -> None:
        return None

    @classmethod
    def get_fp8_group(cls) -> None:
        return None

    @classmethod
    def set_skip_fp8_weight_update_tensor(cls, skip: bool) -> None:
        pass

    @classmethod
    def reduce_and_update_fp8_tensors(cls, *args: Any, **kwargs: Any) -> None:
        pass


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Does nothing when disabled.

    Raises:
        NotImplementedError: when enabled.
    """
    if enabled:
        raise NotImplementedError(_NO_FP8)
    yield


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Does nothing when disabled.

    Raises:
        NotImplementedError: when enabled.
    """
    if enabled:
        raise NotImplementedError(_NO_FP8)
    yield
