"""The draft algorithms there are: one row each. No torch."""

from __future__ import annotations

from post_training.common.errors import UsageError, suggest
from post_training.drafts.algorithm import DraftAlgorithm
from post_training.drafts.eagle3.algorithm import EAGLE3

_ROWS: list[DraftAlgorithm] = [
    EAGLE3,
]
ALGORITHMS = {each.name: each for each in _ROWS}


def find(name: str) -> DraftAlgorithm:
    """The algorithm of a flag or of a checkpoint's record.

    Raises:
        UsageError: if there is none of this name.
    """
    if name not in ALGORITHMS:
        hint = suggest(name, ALGORITHMS) or f"known are {', '.join(ALGORITHMS)}"
        raise UsageError(f"draft algorithm {name}", "unknown name", hint)
    return ALGORITHMS[name]
