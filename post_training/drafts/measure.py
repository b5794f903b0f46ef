"""Measuring a draft: speculative against plain greedy decoding of the same model, prompt by prompt.

Both decode one sequence at a time in the same run, so that their speeds compare.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from post_training.drafts.acceptance import Acceptance, matching

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, with the identity and the category of its row."""

    id: str | int
    prompt: list[int]
    category: str | None = None


@dataclass(frozen=True)
class Measured:
    """One answer, decoded twice.

    Attributes:
        question: what was asked.
        plain: tokens of greedy decoding.
        speculative: tokens of speculative decoding; the same, or something is wrong.
        accepted: draft tokens that each verification accepted.
        plain_seconds, speculative_seconds: for the whole answer, the pass over the prompt too.
        difference: where the tokens part, see :func:`_difference`; None if they do not.
    """

    question: Question
    plain: list[int]
    speculative: list[int]
    accepted: list[int]
    plain_seconds: float
    speculative_seconds: float
    difference: dict[str, Any] | None = None


def measure(
    model: torch.nn.Module,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    steps: int,
    eos_ids: Sequence[int],
    vocab_size: int,
    progress: Callable[[], None] = lambda: None,
) -> list[Measured]:
    """Answer ``questions`` twice each; a collective call of one copy of the model.

    Differences are known on the last pipeline stage only, where the logits are.
    """
    from post_training.drafts.eagle3 import decoding as speculative
    from post_training.inference import generation

    found = []
    end = list(eos_ids)
    if questions:
        # The first passes fill caches and compile kernels: they belong to neither time.
        warm_up = questions[0].prompt
        generation.generate(model, [warm_up], 4, end, vocab_size=vocab_size)
        speculative.decode(model, warm_up, 4, end, steps=steps, vocab_size=vocab_size)
    for question in questions:
        begun = _now()
        [plain] = generation.generate(
            model, [question.prompt], max_new_tokens, end, vocab_size=vocab_size
        )
        between = _now()
        drafted = speculative.decode(
            model, question.prompt, max_new_tokens, end, steps=steps, vocab_size=vocab_size
        )
        ended = _now()
        difference = None
        if drafted.tokens != plain:
            difference = _difference(
                model, question, max_new_tokens, steps, end, vocab_size, drafted.tokens, plain
            )
        found.append(
            Measured(
                question,
                plain,
                drafted.tokens,
                drafted.accepted,
                between - begun,
                ended - between,
                difference,
            )
        )
        progress()
    return found


def _difference(
    model: torch.nn.Module,
    question: Question,
    max_new_tokens: int,
    steps: int,
    eos_ids: Sequence[int],
    vocab_size: int,
    drafted: Sequence[int],
    plain: Sequence[int],
) -> dict[str, Any] | None:
    """The first different token, with what each way of decoding thought of it.

    Both are repeated with their choices written down. ``rounding`` says whether the two best
    logits were so near each other, in either way, that the order of a sum decides between them:
    a pass over several tokens at once adds in another order than one over a single token.
    """
    import torch

    from post_training.drafts.eagle3 import decoding as speculative
    from post_training.drafts.eagle3.decoding import Choice
    from post_training.inference import forward, generation

    seen: list[Choice] = []
    speculative.decode(
        model,
        question.prompt,
        max_new_tokens,
        eos_ids,
        steps=steps,
        vocab_size=vocab_size,
        watch=seen,
    )
    greedy: list[Choice] = []

    def choose(logits: torch.Tensor, _rows: Any, _positions: Any) -> torch.Tensor:
        greedy.append(Choice.of(logits[0]))
        return logits.argmax(dim=-1)

    generation.generate(
        model, [question.prompt], max_new_tokens, eos_ids, vocab_size=vocab_size, choose=choose
    )
    if not greedy:
        return None
    at = matching(drafted, plain)
    if at >= min(len(seen), len(greedy)):
        return {"position": at, "plain": None, "speculative": None, "rounding": False}
    both = (greedy[at], seen[at])
    gap = min(choice.logit - choice.second_logit for choice in both)
    size = max(abs(choice.logit) for choice in both)
    precision = torch.finfo(forward.dtype_of(forward.unwrap(model))).eps
    return {
        "position": at,
        "plain": both[0]._asdict(),
        "speculative": both[1]._asdict(),
        "rounding": gap <= max(4 * precision, 1e-5) * size,
    }


def _now() -> float:
    """Seconds; what a GPU was asked to do is done by then."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def summarize(measured: Sequence[Measured], steps: int) -> dict[str, Any]:
    """Acceptance as a whole and by category, speeds, and whether the outputs are the same."""
    whole = Acceptance(steps, [each.accepted for each in measured])
    by_category: dict[str, list[list[int]]] = {}
    for each in measured:
        if each.question.category is not None:
            by_category.setdefault(each.question.category, []).append(each.accepted)
    tokens = sum(len(each.plain) for each in measured)
    plain = tokens / sum(each.plain_seconds for each in measured)
    drafted = sum(len(each.speculative) for each in measured) / sum(
        each.speculative_seconds for each in measured
    )
    return {
        **whole.to_json(),
        "categories": {
            name: Acceptance(steps, accepted).to_json()
            for name, accepted in sorted(by_category.items())
        },
        "tokens": tokens,
        "plain_tokens_per_second": round(plain, 3),
        "speculative_tokens_per_second": round(drafted, 3),
        "speed_up": round(drafted / plain, 4),
        "identical_answers": sum(each.plain == each.speculative for each in measured),
        "differences": [
            {"id": each.question.id, **(each.difference or {})}
            for each in measured
            if each.plain != each.speculative
        ],
    }
