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

White space around a question, which every fourteenth has, is left out, as there. Two known variants
score differently and are not used: the authors' script has a second blank before the subject (an
accident of how it joins the words; lm-evaluation-harness has one), and ModelOpt's has no line break
before ``Answer:`` in the examples. Pure Python: nothing here imports torch.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
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


def prompt(question: Question, examples: Sequence[Question] = ()) -> str:
    """Header of the subject, the solved ``examples`` in order, then the question."""
    subject = question.subject.replace("_", " ")
    header = f"The following are multiple choice questions (with answers) about {subject}.\n\n"
    solved = [f"{_body(each)} {LETTERS[each.answer]}\n\n" for each in examples]
    return "".join([header, *solved, _body(question)])


def _body(question: Question) -> str:
    """Question and choices up to ``Answer:``, which the model continues with a letter."""
    lettered = zip(LETTERS, question.choices, strict=False)
    choices = [f"{letter}. {choice}" for letter, choice in lettered]
    return "\n".join([question.question.strip(), *choices, "Answer:"])


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

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "interval_95": list(wilson_interval(self.correct, self.total)),
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
    """Compare the indices of the predicted choices with the right ones, in the same order."""
    total = Counter(question.subject for question in questions)
    correct = Counter(
        question.subject
        for question, chosen in zip(questions, predictions, strict=True)
        if chosen == question.answer
    )
    return Score({name: Count(correct[name], total[name]) for name in sorted(total)})
