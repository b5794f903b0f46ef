"""MMLU's answers as a measure that two models are compared by."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from post_training.evaluation.answers import Answer, Measure
from post_training.evaluation.mmlu_prompts import LETTERS

if TYPE_CHECKING:
    from post_training.evaluation.mmlu_asked import Result
    from post_training.evaluation.mmlu_stage_options import MmluStageOptions

NAME = "mmlu"


def measure(result: Result, few_shots: int) -> Measure:
    """The answers of :func:`post_training.evaluation.mmlu.evaluate`."""
    numbers: Counter[str] = Counter()
    found = []
    for question, chosen in zip(result.questions, result.predictions, strict=True):
        number = numbers[question.subject]
        numbers[question.subject] += 1
        found.append(
            Answer(
                id=f"{question.subject}/{number}",
                question=question.question,
                expected=LETTERS[question.answer],
                given=LETTERS[chosen],
                right=chosen == question.answer,
            )
        )
    scored = result.score.to_json()
    details = {
        "few_shots": few_shots,
        "macro_accuracy": scored["macro_accuracy"],
        "ties": result.ties,
        "subjects": scored["subjects"],
        "answers": result.letters(),
    }
    return Measure(NAME, found, details)


def reported(options: MmluStageOptions, result: Result, seconds: float) -> dict[str, Any]:
    """The part of the report that is about the score."""
    scored = result.score.to_json()
    bound = options.lower_bound
    return {
        "few_shots": options.questions.few_shots,
        "fraction": options.questions.fraction,
        **scored,
        "passed": bound is None or scored["accuracy"] >= bound,
        "ties": result.ties,
        "answers": result.letters(),
        "seconds": round(seconds, 3),
        "prompt_tokens": result.prompt_tokens,
        "computed_tokens": result.computed_tokens,
    }
