"""How an evaluation is reported: JSON, the questions that flipped, and a table. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints.source import Source
from post_training.common import files, outputs
from post_training.common.errors import UsageError

if TYPE_CHECKING:
    from post_training.distributed.session import Session

OPTION = "--evaluate-output"


def require_same_vocabulary(source: Source, reference: Source) -> None:
    """Raise UsageError where distributions of the next token cannot be compared."""
    if source.described is None or reference.described is None:
        return
    mine, theirs = source.architecture.vocab_size, reference.architecture.vocab_size
    if mine != theirs:
        raise UsageError(
            f"--reference {reference.location}",
            f"its vocabulary has {theirs:,} tokens, the model's {mine:,}: probabilities of "
            "different tokens cannot be compared",
            "name the model that this one was made from, or leave --text out",
        )


def flips_of(report_file: Path) -> Path:
    """Where the questions lie that one model answers right and the other wrong."""
    return report_file.with_suffix(".flips.jsonl")


def check_target(report_file: Path, stage: str) -> None:
    """Raise UsageError where the report, or the file beside it, cannot be written."""
    outputs.check_file(report_file, OPTION, stage)
    flips, what = flips_of(report_file), f"{OPTION} {report_file}"
    if flips == report_file:
        raise UsageError(what, "the questions that flip get this name", "name it FILE.json")
    if flips.is_dir() or (flips.exists() and not report_file.exists()):
        cause = f"the questions that flip would replace {flips}"
        raise UsageError(what, cause, "name another file, or move what is there")


def write(
    path: Path, content: dict[str, Any], flips: Sequence[Mapping[str, str]] | None, session: Session
) -> dict[str, Any]:
    """Write the report, and with a reference the flips, on the first rank. Returns the content."""
    if session.is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = flips_of(path)
        if flips is None:
            beside.unlink(missing_ok=True)  # of an earlier report of this name
        else:
            rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in flips)
            files.write_text(beside, rows)
            described = {"file": beside.name, "rows": len(flips), **files.describe(beside)}
            content = {**content, "flipped": described}
        files.write_json(path, content)
    return content


def print_table(content: Mapping[str, Any]) -> None:
    """What was measured of both models, to stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="evaluation", title_justify="left")
    table.add_column("measure", no_wrap=True)
    for name in ("model", "reference", "difference (95 % interval)", "p"):
        table.add_column(name, justify="right")
    for row in (*_text_rows(content.get("text", {})), *_measure_rows(content["measures"])):
        table.add_row(*row)
    Console().print(table)


def _text_rows(text: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    if not text:
        return
    mine, other = (_perplexity(text.get(role)) for role in ("model", "reference"))
    difference = ""
    if "difference" in text:
        found = text["difference"]
        ratio = f"x {found['perplexity_ratio']:.4f}, loss {found['loss']:+.4f}"
        difference = ratio + _interval(found["interval_95"], "+.4f")
    yield f"perplexity of {text['tokens']:,} tokens", mine, other, difference, ""
    if "kl" in text:
        kl = text["kl"]
        shown = f"{kl['mean']:.6f}{_interval(kl['interval_95'], '.6f')}"
        yield "KL divergence of the next token, nats", "", "", shown, ""
        yield "its largest", "", "", f"{kl['max']:.4f}", ""
        same = text["top_1_agreement"]
        shown = f"{100 * same['share']:.2f} %"
        interval = same["interval_95"] and [100 * bound for bound in same["interval_95"]]
        yield "same most probable token", "", "", shown + _interval(interval, ".2f"), ""


def _measure_rows(measures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, entry in measures.items():
        mine, other = (_accuracy(entry.get(role)) for role in ("model", "reference"))
        difference = p = ""
        if "difference" in entry:
            found = entry["difference"]
            difference = f"{found['difference']:+.4f}{_interval(found['interval_95'], '+.4f')}"
            difference += f", {found['gained']} gained, {found['lost']} lost"
            p = f"{found['mcnemar_p']:.3g}"
        yield f"{name}, {entry['model']['total']:,} questions", mine, other, difference, p


def _perplexity(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    shown = "too large" if entry["perplexity"] is None else f"{entry['perplexity']:.4f}"
    return shown + _interval(entry["interval_95"], ".4f")


def _accuracy(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    return f"{entry['accuracy']:.4f}{_interval(entry['interval_95'], '.3f')}"


def _interval(bounds: Sequence[float | None] | None, form: str) -> str:
    if bounds is None or None in bounds:
        return ""
    low, high = bounds
    return f" ({low:{form}} to {high:{form}})"
