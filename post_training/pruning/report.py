"""What prune prints at its end and records in the manifest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import report
from post_training.pruning.options import PruneOptions
from post_training.pruning.search import Size
from post_training.pruning.space import MEANINGS

if TYPE_CHECKING:
    from rich.table import Table

    from post_training.models.architecture import Architecture
    from post_training.pruning.minitron import PruningResult


@dataclass(frozen=True)
class ModelScores:
    """One model: its architecture, its size, and its scores where they were asked for.

    Attributes:
        loss: mean cross entropy on the calibration text, in nats.
        accuracy: share of MMLU's questions that are right.
    """

    architecture: Architecture
    size: Size
    loss: float | None = None
    accuracy: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {**self.size.to_json(), "loss": self.loss, "mmlu_accuracy": self.accuracy}


def metrics(
    result: PruningResult,
    before: ModelScores,
    after: ModelScores,
    candidate_sizes: Iterable[Size],
    calibration: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest's metrics.

    Args:
        candidate_sizes: of ``result.candidates``, in their order.
        calibration: the data; recorded where it was used, rather than scores of the cache.
    """
    return {
        "pruned": result.config,
        "kept_layers": result.kept_layers,
        "layer_scores": {str(n): value for n, value in sorted(result.layer_scores.items())},
        "before": before.to_json(),
        "after": after.to_json(),
        "candidates": [
            {"config": dict(each.ss_config), "score": each.score, **size.to_json()}
            for each, size in zip(result.candidates, candidate_sizes, strict=True)
        ],
        "candidates_within_limits": result.fitting,
        "calibration": dict(calibration) if result.calibrated else None,
    }


def show(
    options: PruneOptions,
    save: Path,
    content: Mapping[str, Any],
    before: ModelScores,
    after: ModelScores,
) -> None:
    """Print candidates, before and after, and what a pruned model needs next.

    Args:
        content: of ``run.json``.
    """
    from rich.console import Console

    console, found = Console(stderr=True), content["metrics"]
    if found["candidates"]:
        scored_by = "MMLU accuracy" if options.mmlu.mmlu_dataset else "log-likelihood"
        console.print(_candidates(found, scored_by))
    console.print(_before_and_after(options, found["pruned"], before, after))
    scores, calibration = f"kept in {options.prune_intermediate_ckpt}", found["calibration"]
    if calibration is not None:
        scores = (
            f"{calibration['sequences']:,} sequences of {calibration['sequence_length']:,}, "
            f"{calibration['tokens_per_second']:,.0f} tokens/s"
        )
    report.summary(
        "checkpoint",
        {
            "kept layers": _ranges(found["kept_layers"]),
            "scores from": scores,
            "checkpoint": f"{save} ({report.size(save)})",
            **report.cost(content),
            "note": "weights were cut and not trained: a pruned model needs distillation from "
            "the original before it is of use",
        },
        next_step=f"TEACHER_CKPT={options.load or options.pretrained_model_path} "
        f"MLM_MODEL_CKPT={save} bash distill.sh <conf>",
    )


def _candidates(found: Mapping[str, Any], scored_by: str) -> Table:
    """The candidates that were scored, the best first."""
    from rich.table import Table

    candidates, fitting = found["candidates"], found["candidates_within_limits"]
    title = f"candidates: {len(candidates)} scored of {fitting} within the limits"
    table = Table(title=title, title_justify="left", title_style="bold")
    names = list(candidates[0]["config"])
    table.add_column("")
    for name in names:
        table.add_column(MEANINGS[name], justify="right")
    for name in ("params", "memory", scored_by):
        table.add_column(name, justify="right", no_wrap=name != scored_by)
    for number, each in enumerate(candidates, start=1):
        table.add_row(
            str(number),
            *(f"{each['config'][name]:,}" for name in names),
            f"{each['parameters']:,}",
            report.number_of_bytes(each["weight_bytes"] + each["cache_bytes"]),
            f"{each['score']:.4f}",
            style="bold" if number == 1 else None,
        )
    return table


def _before_and_after(
    options: PruneOptions, pruned: Mapping[str, int], before: ModelScores, after: ModelScores
) -> Table:
    from rich.table import Table

    table = Table(title="pruned", title_justify="left", title_style="bold")
    table.add_column("", style="cyan", no_wrap=True)
    for name in ("before", "after", "left"):
        table.add_column(name, justify="right", no_wrap=True)

    def row(text: str, old: float, new: float, shown: Callable[[float], str]) -> None:
        table.add_row(text, shown(old), shown(new), f"{new / old:.1%}" if old else "")

    old, new = before.architecture.resolved(), after.architecture.resolved()
    for name, text in MEANINGS.items():
        if new.get(name) and (name in pruned or name in ("num_layers", "hidden_size")):
            row(text, old[name], new[name], "{:,}".format)
    small, large, memory = after.size, before.size, options.memory
    row("parameters", large.parameters, small.parameters, "{:,}".format)
    if large.active != large.parameters:
        row("parameters used for a token", large.active, small.active, "{:,}".format)
    row("weights in 16 bits", large.weights, small.weights, report.number_of_bytes)
    cache = f"cache of {memory.batch_size} x {memory.sequence_length:,} tokens"
    row(cache, large.cache, small.cache, report.number_of_bytes)
    if before.loss is not None and after.loss is not None:
        perplexities = [f"{math.exp(min(x, 700)):,.2f}" for x in (before.loss, after.loss)]
        table.add_row("perplexity of the calibration text", *perplexities)
    if before.accuracy is not None and after.accuracy is not None:
        row("MMLU accuracy", before.accuracy, after.accuracy, "{:.4f}".format)
    return table


def _ranges(numbers: list[int]) -> str:
    """``1-3, 5``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    return ", ".join("-".join(map(str, each)) for each in found)
