"""Statistics of one model's scores and of two models' scores on the same questions.

Accuracy of one model: Wilson's interval (:mod:`mmlu_prompts`). Difference of two models' accuracies
on the same questions: the adjusted Wald interval of Bonett and Price (2012) for paired proportions,
and McNemar's exact test, a binomial test of the questions that only one of them answers right.
Means over tokens, which are not independent of each other within a document: the percentile
bootstrap over documents. No torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

_Z = statistics.NormalDist().inv_cdf(0.975)
_RESAMPLES = 2000
_SEED = 20120


@dataclass(frozen=True)
class Paired:
    """Two models' answers to the same ``total`` questions.

    Attributes:
        gained: questions that the model answers right and the reference wrong.
        lost: the other way round.
    """

    total: int
    gained: int
    lost: int

    @property
    def difference(self) -> float:
        """Accuracy of the model less that of the reference."""
        return (self.gained - self.lost) / self.total if self.total else math.nan

    def interval(self) -> tuple[float, float]:
        """95 % confidence interval of the difference; (-1, 1) without questions."""
        if self.total == 0:
            return -1.0, 1.0
        gained, lost = ((count + 1) / (self.total + 2) for count in (self.gained, self.lost))
        middle = gained - lost
        spread = _Z * math.sqrt((gained + lost - middle**2) / (self.total + 2))
        return max(-1.0, middle - spread), min(1.0, middle + spread)

    def mcnemar(self) -> float:
        """Two-sided exact p of as uneven a split of the changed questions, were it by chance."""
        changed, fewer = self.gained + self.lost, min(self.gained, self.lost)
        # Of whole numbers: neither overflow nor rounding, whatever their size.
        tail = 0
        term = 1
        for count in range(fewer + 1):
            tail += term
            term = term * (changed - count) // (count + 1)
        return min(1.0, _ratio(2 * tail, changed))

    def to_json(self) -> dict[str, Any]:
        return {
            "difference": self.difference,
            "interval_95": list(self.interval()),
            "gained": self.gained,
            "lost": self.lost,
            "mcnemar_p": self.mcnemar(),
        }


def _ratio(numerator: int, exponent: int) -> float:
    """``numerator / 2**exponent``, also where neither fits a float."""
    excess = max(0, numerator.bit_length() - 64)
    return math.ldexp(float(numerator >> excess), excess - exponent)


def paired(right: Sequence[bool], reference: Sequence[bool]) -> Paired:
    """What two lists over the same questions say, each of whether the answer was right."""
    both = list(zip(right, reference, strict=True))
    gained = sum(mine and not other for mine, other in both)
    return Paired(len(both), gained, sum(other and not mine for mine, other in both))


def of_means(sums: Sequence[Sequence[float]], weights: Sequence[float]) -> list[list[float] | None]:
    """95 % intervals of several sums over units, each divided by the sum of the units' weights.

    The percentile bootstrap: units (documents) are drawn with replacement, the same ones for all
    sums. Deterministic. None for fewer than two units.

    Args:
        sums: of each quantity, its value in each unit.
        weights: tokens of each unit.
    """
    import numpy

    count = len(weights)
    if count < 2:
        return [None] * len(sums)
    table = numpy.array([weights, *sums], dtype=numpy.float64)
    generator = numpy.random.default_rng(_SEED)
    drawn = numpy.stack(
        [table[:, generator.integers(count, size=count)].sum(axis=1) for _ in range(_RESAMPLES)]
    )
    means: numpy.ndarray = drawn[:, 1:] / drawn[:, :1]
    low, high = numpy.quantile(means, [0.025, 0.975], axis=0)
    return [list(pair) for pair in zip(low.tolist(), high.tolist(), strict=True)]
