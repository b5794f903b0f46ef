"""What a measurement of a draft consists of: prompts, each answered twice. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from post_training.drafts.acceptance import Acceptance


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt as token ids, with the identity and the category of its row."""

    id: str | int
    prompt: list[int]
    category: str | None = None


@dataclass(frozen=True)
class AnswerPair:
    """The answer to one prompt, decoded plainly and speculatively.

    Attributes:
        question: what was asked.
        plain: tokens of greedy decoding.
        speculative: tokens of speculative decoding; the same, or something is wrong.
        accepted: draft tokens that each verification accepted.
        plain_seconds, speculative_seconds: for the whole answer, the pass over the prompt too.
        difference: where the tokens differ first, and why (``measure.difference``); None if they
            do not.
    """

    question: TokenizedPrompt
    plain: list[int]
    speculative: list[int]
    accepted: list[int]
    plain_seconds: float
    speculative_seconds: float
    difference: dict[str, Any] | None = None


def summarize(pairs: Sequence[AnswerPair], steps: int) -> dict[str, Any]:
    """Acceptance as a whole and by category, speeds, and whether the answers are the same."""
    whole = Acceptance(steps, [each.accepted for each in pairs])
    by_category: dict[str, list[list[int]]] = {}
    for each in pairs:
        if each.question.category is not None:
            by_category.setdefault(each.question.category, []).append(each.accepted)
    tokens = sum(len(each.plain) for each in pairs)
    plain = tokens / sum(each.plain_seconds for each in pairs)
    speculative = sum(len(each.speculative) for each in pairs) / sum(
        each.speculative_seconds for each in pairs
    )
    return {
        **whole.to_json(),
        "categories": {
            name: Acceptance(steps, accepted).to_json()
            for name, accepted in sorted(by_category.items())
        },
        "tokens": tokens,
        "plain_tokens_per_second": round(plain, 3),
        "speculative_tokens_per_second": round(speculative, 3),
        "speed_up": round(speculative / plain, 4),
        "identical_answers": sum(each.plain == each.speculative for each in pairs),
        "differences": [
            {"id": each.question.id, **(each.difference or {})}
            for each in pairs
            if each.plain != each.speculative
        ],
    }
