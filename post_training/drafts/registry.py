"""The draft algorithms there are: one row each. No torch."""

from __future__ import annotations

from post_training.config.checks import check_choice
from post_training.drafts.algorithm import DraftAlgorithm
from post_training.drafts.eagle3.algorithm import EAGLE3

_ROWS: list[DraftAlgorithm] = [
    EAGLE3,
]
ALGORITHMS = {each.name: each for each in _ROWS}


def find(name: str) -> DraftAlgorithm:
    """The algorithm of a flag or of a checkpoint's record; UsageError if there is none."""
    check_choice("draft algorithm", name, list(ALGORITHMS))
    return ALGORITHMS[name]
