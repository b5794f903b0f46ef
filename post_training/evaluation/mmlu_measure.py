"""MMLU's answers as a measure that two models are compared by."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from post_training.evaluation.answers import Answer, Measure
from post_training.evaluation.mmlu_prompts import LETTERS

if TYPE_CHECKING:
    from post_training.evaluation.mmlu import Result

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
