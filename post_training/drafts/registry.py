"""The draft algorithms there are: one row each. No torch."""

from __future__ import annotations

from post_training.common.errors import UsageError, suggest
from post_training.drafts.algorithm import DraftAlgorithm
from post_training.drafts.eagle3.algorithm import EAGLE3

ALGORITHMS: dict[str, DraftAlgorithm] = {each.name: each for each in (EAGLE3,)}


def find(name: str) -> DraftAlgorithm:
    """The algorithm of a flag or of a checkpoint's record.

    Raises:
        UsageError: if there is none of this name.
    """
    if name not in ALGORITHMS:
        hint = suggest(name, ALGORITHMS) or f"known are {', '.join(ALGORITHMS)}"
        raise UsageError(f"draft algorithm {name}", "unknown name", hint)
    return ALGORITHMS[name]
