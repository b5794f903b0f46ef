"""MMLU: the published prompt format, which questions are asked, and the statistics of a score.

Format: Hendrycks et al., "Measuring Massive Multitask Language Understanding" (ICLR 2021), as its
authors' code writes it and lm-evaluation-harness repeats it::

    The following are multiple choice questions (with answers) about abstract algebra.

    <question>
    A. <choice>
    B. <choice>
    C. <choice>
    D. <choice>
    Answer: B

    <question>
    ...
    Answer:

Two known variants score differently and are not used: the authors' script has a second blank
before the subject (an accident of how it joins the words; lm-evaluation-harness has one), and
ModelOpt's has no line break before ``Answer:`` in the examples. Pure Python: nothing here imports
torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = "ABCDEFGHIJ"
# Two-sided 95 % quantile of the normal distribution.
_Z = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; ``answer`` is the index of the right choice."""

    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int


def header(subject: str) -> str:
    """First line of a prompt; underscores of the subject become blanks."""
    name = subject.replace("_", " ")
    return f"The following are multiple choice questions (with answers) about {name}.\n\n"


def body(question: Question) -> str:
    """Question and choices up to ``Answer:``, which the model continues with a letter."""
    lines = [question.question]
    lines += [
        f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices, strict=False)
    ]
    return "\n".join([*lines, "Answer:"])


def example(question: Question) -> str:
    """A solved question, as few-shot examples are written."""
    return f"{body(question)} {LETTERS[question.answer]}\n\n"


def prompt(question: Question, examples: Sequence[Question] = ()) -> str:
    """Header of the subject, the solved ``examples`` in order, then the question."""
    return header(question.subject) + "".join(map(example, examples)) + body(question)


def select(test: Mapping[str, Sequence[Question]], fraction: float = 1.0) -> list[Question]:
    """The first ``ceil(fraction * n)`` questions of each subject (of n), subjects in order.

    As ModelOpt's evaluation does, so that figures compare.
    """
    chosen: list[Question] = []
    for questions in test.values():
        chosen += questions[: math.ceil(fraction * len(questions))]
    return chosen


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, 1927). (0, 1) without questions.

    Unlike the normal approximation it stays inside [0, 1] and is right for small counts.
    """
    if total == 0:
        return 0.0, 1.0
    share = correct / total
    spread = _Z * math.sqrt(share * (1 - share) / total + _Z**2 / (4 * total**2))
    scale = 1 + _Z**2 / total
    middle = share + _Z**2 / (2 * total)
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


@dataclass(frozen=True)
class Count:
    """Right answers of ``total`` questions."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total if self.total else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval."""
        return wilson_interval(self.correct, self.total)

    def to_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {
            "accuracy": self.accuracy,
            "interval_95": [low, high],
            "correct": self.correct,
            "total": self.total,
        }


@dataclass(frozen=True)
class Score:
    """Counts by subject, in order, and their averages."""

    subjects: dict[str, Count]

    @property
    def total(self) -> Count:
        """All questions together: the micro average, MMLU's usual figure."""
        counts = self.subjects.values()
        return Count(sum(c.correct for c in counts), sum(c.total for c in counts))

    @property
    def macro(self) -> float:
        """Mean of the subjects' accuracies, each subject counting the same."""
        return statistics.fmean(count.accuracy for count in self.subjects.values())

    def to_json(self) -> dict[str, Any]:
        return {
            **self.total.to_json(),
            "macro_accuracy": self.macro,
            "subjects": {name: count.to_json() for name, count in self.subjects.items()},
        }


def score(questions: Sequence[Question], predictions: Iterable[int]) -> Score:
    """Compare predicted choices with the right ones.

    Args:
        questions: what was asked.
        predictions: index of the chosen answer for each question, in the same order.
    """
    counts: dict[str, list[int]] = {}
    for question, chosen in zip(questions, predictions, strict=True):
        entry = counts.setdefault(question.subject, [0, 0])
        entry[0] += chosen == question.answer
        entry[1] += 1
    return Score({name: Count(*entry) for name, entry in sorted(counts.items())})
