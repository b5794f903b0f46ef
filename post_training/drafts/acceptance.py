"""What a measurement of a draft consists of: prompts, each answered twice, and what was accepted.

Acceptance length is counted as vLLM counts it: the tokens that a forward pass of the target emits,
which are the accepted draft tokens and one more that the target itself chose. Without a draft it is
1; with k draft tokens at most k + 1. The pass over the prompt verifies nothing and does not count;
the last verification counts in full, also where the answer ends or is cut within it. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


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
        plain: tokens of greedy decoding.
        speculative: tokens of speculative decoding; the same, or something is wrong.
        accepted: draft tokens that each verification accepted.
        plain_seconds, speculative_seconds: for the whole answer, the pass over the prompt too.
        difference: where the tokens differ first, and why; None if they do not.
    """

    question: TokenizedPrompt
    plain: list[int]
    speculative: list[int]
    accepted: list[int]
    plain_seconds: float
    speculative_seconds: float
    difference: dict[str, Any] | None = None


@dataclass(frozen=True)
class Acceptance:
    """What was accepted in one or more answers.

    Attributes:
        steps: draft tokens proposed to each verification, k.
        accepted: for each answer, the number of accepted draft tokens, 0 to k, of each of its
            verifications.
    """

    steps: int
    accepted: Sequence[Sequence[int]]

    @property
    def flat(self) -> list[int]:
        """Accepted draft tokens of all verifications."""
        return [count for answer in self.accepted for count in answer]

    @property
    def length(self) -> float | None:
        """Mean tokens that a verification emits: 1 to k + 1; None without any verification."""
        return 1 + sum(self.flat) / len(self.flat) if self.flat else None

    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of :attr:`length`; None with fewer than two answers.

        Verifications of one answer are correlated, so answers are the samples: the length
        is a ratio of two sums over them, and its variance that of the ratio estimator (Cochran,
        Sampling Techniques, 1977, section 2.11), with Student's t for few answers. It is cut to
        1 to k + 1.
        """
        from scipy.special import stdtrit  # quantile of Student's t

        answers = [answer for answer in self.accepted if answer]
        if len(answers) < 2 or self.length is None:
            return None
        residuals = [sum(answer) + len(answer) * (1 - self.length) for answer in answers]
        count = len(answers)
        variance = count / (count - 1) * sum(each**2 for each in residuals)
        error = math.sqrt(variance) / len(self.flat)
        half = float(stdtrit(count - 1, 0.975)) * error
        return max(1.0, self.length - half), min(self.steps + 1.0, self.length + half)

    def to_json(self) -> dict[str, Any]:
        """For a report: rates are shares of the proposed draft tokens, at each position 1 to k too.

        The histogram counts verifications that emitted 1, 2, ... k + 1 tokens.
        """
        flat, length, interval = self.flat, self.length, self.interval()
        positions = range(1, self.steps + 1)
        at_least = [sum(count >= position for count in flat) for position in positions]
        return {
            "answers": len(self.accepted),
            "verifications": len(flat),
            "acceptance_length": None if length is None else round(length, 5),
            "interval_95": [round(each, 5) for each in interval] if interval else None,
            "acceptance_rate": None if length is None else round((length - 1) / self.steps, 5),
            "acceptance_rate_by_position": [round(n / max(1, len(flat)), 5) for n in at_least],
            "histogram": [flat.count(accepted) for accepted in range(self.steps + 1)],
        }


def summarize(pairs: Sequence[AnswerPair], steps: int) -> dict[str, Any]:
    """Acceptance as a whole and by category, speeds, and whether the answers are the same."""
    by_category: dict[str, list[list[int]]] = {}
    for each in pairs:
        if each.question.category is not None:
            by_category.setdefault(each.question.category, []).append(each.accepted)
    tokens = sum(len(each.plain) for each in pairs)
    plain = tokens / sum(each.plain_seconds for each in pairs)
    speculative = sum(len(each.speculative) for each in pairs) / sum(
        each.speculative_seconds for each in pairs
    )
    different = [each for each in pairs if each.plain != each.speculative]
    return {
        **Acceptance(steps, [each.accepted for each in pairs]).to_json(),
        "categories": {
            name: Acceptance(steps, accepted).to_json()
            for name, accepted in sorted(by_category.items())
        },
        "tokens": tokens,
        "plain_tokens_per_second": round(plain, 3),
        "speculative_tokens_per_second": round(speculative, 3),
        "speed_up": round(speculative / plain, 4),
        "identical_answers": len(pairs) - len(different),
        "differences": [{"id": each.question.id, **(each.difference or {})} for each in different],
    }


def matching(proposed: Iterable[int], chosen: Iterable[int]) -> int:
    """Length of the common beginning of two sequences."""
    count = 0
    for first, second in zip(proposed, chosen, strict=False):
        if first != second:
            break
        count += 1
    return count
