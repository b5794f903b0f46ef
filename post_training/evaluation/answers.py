"""A model's answers to questions that are right or wrong, and two models' answers side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from post_training.evaluation import intervals
from post_training.evaluation.mmlu_prompts import Count


@dataclass(frozen=True)
class Answer:
    """One question and what the model said.

    Attributes:
        id: of the question, the same for every model.
        question: its text.
        expected: the right answer.
        given: what was made out in the model's answer.
        text: the whole answer, where it is more than that.
    """

    id: str
    question: str
    expected: str
    given: str
    right: bool
    text: str | None = None


@dataclass(frozen=True)
class Measure:
    """Answers to all questions of a benchmark under one way to judge them.

    Attributes:
        name: such as ``mmlu`` or ``gsm8k_strict``.
        details: more that the report says of this model.
    """

    name: str
    answers: Sequence[Answer]
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def count(self) -> Count:
        return Count(sum(each.right for each in self.answers), len(self.answers))

    def to_json(self) -> dict[str, Any]:
        return {**self.count.to_json(), **self.details}


def paired(mine: Measure, reference: Measure) -> intervals.Paired:
    """How the answers differ; ValueError unless the questions are the same."""
    if [each.id for each in mine.answers] != [each.id for each in reference.answers]:
        raise ValueError(f"{mine.name}: the two models were asked different questions")
    right, other = ([each.right for each in side.answers] for side in (mine, reference))
    return intervals.paired(right, other)


def compared(
    mine: Sequence[Measure], references: Sequence[Measure] | None
) -> dict[str, dict[str, Any]]:
    """By measure what the report says: of the model, the reference, and their difference."""
    found: dict[str, dict[str, Any]] = {}
    for number, measure in enumerate(mine):
        entry: dict[str, Any] = {"model": measure.to_json()}
        if references is not None:
            reference = references[number]
            entry["reference"] = reference.to_json()
            entry["difference"] = paired(measure, reference).to_json()
        found[measure.name] = entry
    return found


def flipped(mine: Sequence[Measure], references: Sequence[Measure]) -> Iterator[dict[str, str]]:
    """A row for each question that one model answers right and the other wrong."""
    for measure, reference in zip(mine, references, strict=True):
        for answer, other in zip(measure.answers, reference.answers, strict=True):
            if answer.right != other.right:
                texts = {"model_text": answer.text, "reference_text": other.text}
                yield {
                    "measure": measure.name,
                    "id": answer.id,
                    "change": "gained" if answer.right else "lost",
                    "question": answer.question,
                    "expected": answer.expected,
                    "model": answer.given,
                    "reference": other.given,
                    **{name: text for name, text in texts.items() if text is not None},
                }
