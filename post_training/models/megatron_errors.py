"""What megatron-core raises for a model that it cannot be, as usage errors."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from post_training.common.errors import UsageError, first_line

logger = logging.getLogger("post_training")

# For sizes that do not go together, and for what is not installed.
_RAISED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def told(overrides: Mapping[str, Any]) -> Iterator[None]:
    """Within this context a model, or its configuration, is built.

    ``overrides`` are the fields that flags set, by name: megatron-core's error may be about them.

    Raises:
        UsageError: in place of an error of megatron-core's own. A device without memory is none.
    """
    import torch

    try:
        yield
    except _RAISED as error:
        if isinstance(error, UsageError | torch.OutOfMemoryError):
            raise
        logger.debug("the model cannot be built", exc_info=True)
        kind = "" if isinstance(error, AssertionError | ValueError) else f"{type(error).__name__}: "
        raise UsageError(
            "the model configuration",
            f"megatron-core refuses it: {kind}{first_line(error)}",
            _remedy(str(error), overrides),
        ) from error


def _remedy(error: str, overrides: Mapping[str, Any]) -> str:
    """What to change: the variables or flags that the error names, or all flags that were given."""
    variables = [name for name in os.environ if name.startswith("NVTE_") and name in error]
    if variables:
        return f"unset {' '.join(variables)}"
    spelled = {name: "--" + name.replace("_", "-") for name in overrides}
    named = [flag for name, flag in spelled.items() if name in error]
    if named:
        return f"leave out {' '.join(named)}"
    remedy = "compare config.json with the original, or change those values"
    if spelled:
        remedy += f"; or leave out flags: {' '.join(spelled.values())}"
    return remedy
