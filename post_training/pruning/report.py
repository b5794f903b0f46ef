"""What prune prints at its end and records in the manifest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import report
from post_training.models.architecture import Architecture
from post_training.pruning.options import PruneOptions
from post_training.pruning.space import MEANINGS

if TYPE_CHECKING:
    from rich.table import Table

    from post_training.pruning.minitron import PruningResult
    from post_training.pruning.search import Size


def metrics(
    result: PruningResult,
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    candidate_sizes: Iterable[Size],
    calibration: Mapping[str, Any],
) -> dict[str, Any]:
    """The manifest's metrics.

    Args:
        before, after: size and scores by name.
        candidate_sizes: of ``result.candidates``, in their order.
        calibration: the data; recorded where it was used, rather than scores of the cache.
    """
    return {
        "pruned": result.config,
        "kept_layers": result.kept_layers,
        "layer_scores": {str(n): value for n, value in sorted(result.layer_scores.items())},
        "before": before,
        "after": after,
        "candidates": [
            {"config": dict(each.ss_config), "score": each.score, **asdict(size)}
            for each, size in zip(result.candidates, candidate_sizes, strict=True)
        ],
        "candidates_within_limits": result.fitting,
        "calibration": dict(calibration) if result.calibrated else None,
    }


def show(
    options: PruneOptions, save: Path, content: Mapping[str, Any], original: Architecture
) -> None:
    """Print candidates, before and after, and what a pruned model needs next.

    ``content`` is of ``run.json``, ``original`` the architecture before.
    """
    from rich.console import Console

    console, found = Console(stderr=True), content["metrics"]
    if found["candidates"]:
        scored_by = "MMLU accuracy" if options.mmlu.mmlu_dataset else "log-likelihood"
        console.print(_candidates(found, scored_by))
    pruned = Architecture.from_json(content["architecture"])
    console.print(_before_and_after(options, found, original.resolved(), pruned.resolved()))
    scores, calibration = f"kept in {options.prune_intermediate_ckpt}", found["calibration"]
    if calibration is not None:
        scores = (
            f"{calibration['sequences']:,} sequences of {calibration['sequence_length']:,}, "
            f"{calibration['tokens_per_second']:,.0f} tokens/s"
        )
    report.summary(
        "checkpoint",
        {
            "kept layers": report.ranges(found["kept_layers"]),
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
    options: PruneOptions, found: Mapping[str, Any], old: Mapping[str, Any], new: Mapping[str, Any]
) -> Table:
    from rich.table import Table

    table = Table(title="pruned", title_justify="left", title_style="bold")
    table.add_column("", style="cyan", no_wrap=True)
    for name in ("before", "after", "left"):
        table.add_column(name, justify="right", no_wrap=True)
    before, after = {**old, **found["before"]}, {**new, **found["after"]}

    def row(text: str, name: str, shown: Callable[[float], str] = "{:,}".format) -> None:
        first, second = before[name], after[name]
        if first is not None and second is not None:
            left = f"{second / first:.1%}" if first else ""
            table.add_row(text, shown(first), shown(second), left)

    for name, text in MEANINGS.items():
        if after.get(name) and (name in found["pruned"] or name in ("num_layers", "hidden_size")):
            row(text, name)
    row("parameters", "parameters")
    if before["active_parameters"] != before["parameters"]:
        row("parameters used for a token", "active_parameters")
    row("weights in 16 bits", "weight_bytes", report.number_of_bytes)
    memory = options.memory
    cache = f"cache of {memory.batch_size} x {memory.sequence_length:,} tokens"
    row(cache, "cache_bytes", report.number_of_bytes)
    if before["loss"] is not None and after["loss"] is not None:
        perplexities = [f"{math.exp(min(each['loss'], 700)):,.2f}" for each in (before, after)]
        table.add_row("perplexity of the calibration text", *perplexities)
    row("MMLU accuracy", "mmlu_accuracy", "{:.4f}".format)
    return table
