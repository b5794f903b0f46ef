"""The FP8 state of the process: there is none, and asking for FP8 computation is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformer_engine.common.recipe import NO_LOW_PRECISION


class FP8GlobalStateManager:
    """Says whether FP8 autocasting is on.

    ModelOpt asks before each quantized linear (quantization/plugins/transformer_engine.py:44),
    megatron-core where a layer has a recipe of its own (extensions/transformer_engine.py:313).
    """

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return False


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Does nothing when disabled. extensions/transformer_engine.py:71 imports it.

    Raises:
        NotImplementedError: when enabled.
    """
    if enabled:
        raise NotImplementedError(NO_LOW_PRECISION)
    yield


# megatron-core enters it where weights are to be created in FP8; imported at the same place.
fp8_model_init = fp8_autocast
