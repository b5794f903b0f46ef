"""What the scores of text say: perplexity, divergence from the reference, agreement with it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from post_training.data.text_windows import Text
from post_training.evaluation import intervals

if TYPE_CHECKING:
    from post_training.evaluation.text_scores import TextScores

# With fewer documents, windows are what is resampled for the intervals.
_DOCUMENTS = 20


def of(text: Text, scores: TextScores) -> dict[str, Any]:
    """The report's entry ``text``."""
    units = "documents" if text.documents >= _DOCUMENTS else "windows"
    of_window = [
        window.document if units == "documents" else number
        for number, window in enumerate(text.windows)
    ]
    tokens = scores.tokens.tolist()
    named = {
        "loss": scores.loss,
        "reference_loss": scores.reference_loss,
        "kl": scores.divergence,
        "top_1": scores.agreeing,
    }
    sums = {name: values.tolist() for name, values in named.items() if values is not None}
    if "reference_loss" in sums:
        pairs = zip(sums["loss"], sums["reference_loss"], strict=True)
        sums["difference"] = [mine - other for mine, other in pairs]
    total = sum(tokens)
    means = {name: math.fsum(values) / total for name, values in sums.items()}
    weights = _by_unit(tokens, of_window)
    spreads = intervals.of_means([_by_unit(each, of_window) for each in sums.values()], weights)
    spread = dict(zip(sums, spreads, strict=True))
    found: dict[str, Any] = {
        "source": text.source,
        "documents": text.documents,
        "windows": len(text.windows),
        "tokens": int(total),
        "ended_by_limit": text.cut,
        "intervals_over": units,
        "model": _perplexity(means["loss"], spread["loss"]),
    }
    if scores.largest is None:
        return found
    return found | {
        "reference": _perplexity(means["reference_loss"], spread["reference_loss"]),
        "difference": {
            "loss": means["difference"],
            "interval_95": spread["difference"],
            "perplexity_ratio": math.exp(means["difference"]),
        },
        "kl": {
            "mean": means["kl"],
            "interval_95": spread["kl"],
            "max": float(scores.largest.max()),
        },
        "top_1_agreement": {"share": means["top_1"], "interval_95": spread["top_1"]},
    }


def _by_unit(values: Sequence[float], units: Sequence[int]) -> list[float]:
    """Sums of the windows' ``values`` for each unit."""
    found: dict[int, float] = {}
    for unit, value in zip(units, values, strict=True):
        found[unit] = found.get(unit, 0.0) + value
    return list(found.values())


def _perplexity(loss: float, interval: Sequence[float] | None) -> dict[str, Any]:
    return {
        "loss": loss,
        "perplexity": _exp(loss),
        "interval_95": None if interval is None else [_exp(bound) for bound in interval],
    }


def _exp(loss: float) -> float | None:
    """None where the perplexity is beyond what a float, and JSON, holds."""
    return math.exp(loss) if loss < 700 else None
