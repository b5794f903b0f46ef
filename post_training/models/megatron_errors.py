"""What megatron-core raises for a model that it cannot be, as usage errors."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

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
def told() -> Iterator[None]:
    """Within this context a model, or its configuration, is built.

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
            "compare config.json with the original, or change those values",
        ) from error
