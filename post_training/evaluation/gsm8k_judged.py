"""The two measures that are made of answers to GSM8K's problems. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from post_training.evaluation import gsm8k
from post_training.evaluation.answers import Answer, Measure
from post_training.evaluation.gsm8k import Problem

MEASURES = {"gsm8k_strict": gsm8k.strict, "gsm8k_flexible": gsm8k.flexible}


def measures(
    problems: Sequence[Problem], texts: Sequence[str], shots: int, max_new_tokens: int
) -> list[Measure]:
    """Both ways to judge the same answers."""
    details = {"few_shots": shots, "max_new_tokens": max_new_tokens}
    found = []
    for name, extract in MEASURES.items():
        judged = [
            Answer(
                id=str(number),
                question=problem.question,
                expected=problem.target,
                given=extract(text),
                right=gsm8k.is_right(extract(text), problem.target),
                text=text,
            )
            for number, (problem, text) in enumerate(zip(problems, texts, strict=True))
        ]
        given = [each.given for each in judged]
        found.append(Measure(name, judged, {**details, "answers": given}))
    return found
