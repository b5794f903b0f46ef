"""Texts that end an answer, such as the beginning of the next question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# More tokens than a text has characters are looked at: special ones have none.
_SPARE = 8


def after(
    tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]
) -> Callable[[Sequence[int]], bool] | None:
    """Whether one of the texts stands at the end of new tokens; None without a text.

    For ``ended`` of :func:`post_training.inference.generation.generate`, which asks after each
    token: only the last ones are decoded.
    """
    wanted = [stop for stop in stops if stop]
    if not wanted:
        return None
    longest = max(len(stop.encode()) for stop in wanted) + _SPARE

    def ended(tokens: Sequence[int]) -> bool:
        text = str(tokenizer.decode(list(tokens[-longest:]), skip_special_tokens=False))
        return any(stop in text for stop in wanted)

    return ended
