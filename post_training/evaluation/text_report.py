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
    named = {
        "loss": scores.loss,
        "reference_loss": scores.reference_loss,
        "kl": scores.divergence,
        "top_1": scores.agreeing,
    }
    sums = {name: values.tolist() for name, values in named.items() if values is not None}
    return of_sums(text, sums, None if scores.largest is None else float(scores.largest.max()))


def of_sums(
    text: Text, sums: dict[str, list[float]], largest: float | None = None
) -> dict[str, Any]:
    """The same, from the sums over each window's scored tokens, by name.

    Args:
        sums: ``loss``, perhaps ``reference_loss``, and with that perhaps ``kl`` and ``top_1``.
        largest: divergence of a token, where there is ``kl``.
    """
    units = "documents" if text.documents >= _DOCUMENTS else "windows"
    of_window = [
        window.document if units == "documents" else number
        for number, window in enumerate(text.windows)
    ]
    tokens = [float(window.scored) for window in text.windows]
    if "reference_loss" in sums:
        pairs = zip(sums["loss"], sums["reference_loss"], strict=True)
        sums = {**sums, "difference": [mine - other for mine, other in pairs]}
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
    if "reference_loss" in sums:
        found["reference"] = _perplexity(means["reference_loss"], spread["reference_loss"])
        found["difference"] = {
            "loss": means["difference"],
            "interval_95": spread["difference"],
            "perplexity_ratio": math.exp(means["difference"]),
        }
    if "kl" in sums:
        found["kl"] = {"mean": means["kl"], "interval_95": spread["kl"], "max": largest}
        found["top_1_agreement"] = {"share": means["top_1"], "interval_95": spread["top_1"]}
    return found


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
