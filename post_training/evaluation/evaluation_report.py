"""How an evaluation is reported: JSON, the questions that flipped, and a table. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints.source import Source
from post_training.common import files, hashing, outputs
from post_training.common.errors import UsageError

if TYPE_CHECKING:
    from post_training.distributed.session import Session

OPTION = "--evaluate-output"
_WIDTH = 100


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
            described = {"file": beside.name, "rows": len(flips), **hashing.describe(beside)}
            content = {**content, "flipped": described}
        files.write_json(path, content)
    return content


def print_table(content: Mapping[str, Any]) -> None:
    """What was measured of both models, to stdout; the report has more intervals."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=_title(content), title_justify="left")
    table.add_column("measure", no_wrap=True)
    for name in ("model", "reference", "difference", "95 % interval", "p"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in (*_text_rows(content.get("text", {})), *_measure_rows(content["measures"])):
        table.add_row(*row)
    # Off a terminal rich takes 80 columns, in which figures would be cut.
    Console(width=max(Console().width, _WIDTH)).print(table)


def _title(content: Mapping[str, Any]) -> str:
    """What was asked: ``evaluation: 1,200 tokens; mmlu: 196 questions``."""
    asked = [f"{content['text']['tokens']:,} tokens"] if "text" in content else []
    for name, entry in content["measures"].items():
        asked.append(f"{name}: {entry['model']['total']:,} questions")
    return f"evaluation: {'; '.join(asked)}"


def _text_rows(text: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    if not text:
        return
    mine, other = (_perplexity(text.get(role)) for role in ("model", "reference"))
    if "reference" not in text:
        yield "perplexity", mine, "", "", _interval(text["model"]["interval_95"], ".3f"), ""
        return
    difference = text["difference"]
    spread = difference["interval_95"] and [math.exp(each) for each in difference["interval_95"]]
    ratio = f"x {difference['perplexity_ratio']:.4f}"
    yield "perplexity", mine, other, ratio, _interval(spread, ".4f"), ""
    if "kl" not in text:  # of servers, which tell single probabilities
        return
    kl, same = text["kl"], text["top_1_agreement"]
    # A divergence of nothing may be rounded to less.
    mean, largest = (f"{max(0.0, kl[name]):.6f}" for name in ("mean", "max"))
    spread = kl["interval_95"] and [max(0.0, each) for each in kl["interval_95"]]
    yield "KL divergence, nats", "", "", mean, _interval(spread, ".6f"), ""
    yield "largest of a token", "", "", largest, "", ""
    share, spread = f"{same['share']:.4f}", _interval(same["interval_95"], ".4f")
    yield "same top token", "", "", share, spread, ""


def _measure_rows(measures: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, entry in measures.items():
        mine = f"{entry['model']['accuracy']:.4f}"
        if "difference" not in entry:
            yield name, mine, "", "", _interval(entry["model"]["interval_95"], ".3f"), ""
            continue
        found = entry["difference"]
        other, difference = f"{entry['reference']['accuracy']:.4f}", f"{found['difference']:+.4f}"
        spread = _interval(found["interval_95"], "+.3f")
        yield name, mine, other, difference, spread, f"{found['mcnemar_p']:.3g}"


def _perplexity(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    return "too large" if entry["perplexity"] is None else f"{entry['perplexity']:.4f}"


def _interval(bounds: Sequence[float | None] | None, form: str) -> str:
    if bounds is None or None in bounds:
        return ""
    low, high = bounds
    return f"{low:{form}} to {high:{form}}"
