"""Sections about evaluations beside a reference: paired differences, and questions that flipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from post_training.common import files, regular
from post_training.reporting import comparable, measures, values
from post_training.reporting.chain import Chain
from post_training.reporting.document import NOT_MEASURED, Block, Section, Table, cut
from post_training.reporting.measures import percent, significant
from post_training.reporting.records import Record

_MOST_ROWS = 300
_LONGEST = 300  # characters of a question
_FLIPS = ("measure", "id", "change", "expected", "model", "reference", "question")


def sections(chain: Chain, problems: list[str]) -> list[Section]:
    """A section with all evaluations; what cannot be read is added to ``problems``."""
    rows: list[list[str]] = []
    flipped: list[Block] = []
    for node in chain.nodes:
        for record in node.reports:
            reference = chain.reference(record)
            against = reference.name if reference else ""
            if comparable.of_weights_alone(record):
                against = f"{against} (weights alone)".strip()
            rows += [[node.name, against, *row] for row in _text(record.content)]
            rows += [[node.name, against, *row] for row in _measures(record.content)]
            found = [list(row) for row in _flips(record, problems)]
            if found:
                caption = f"Questions that {node.name} and {against} answer differently, of "
                caption += f"{record.path.name}: gained and lost by {node.name}"
                flipped.append(Table(caption, _FLIPS, cut(found, _MOST_ROWS), folded=True))
    if not rows:
        return []
    columns = ["model", "reference", "measure", "model's", "reference's", "difference (95 %)"]
    columns += ["gained", "lost", "p (McNemar)"]
    caption = "Evaluations: both models had the same questions and text, so differences are paired."
    return [Section("Evaluations", [Table(caption, columns, cut(rows, _MOST_ROWS)), *flipped])]


def _text(content: Mapping[str, Any]) -> Iterator[list[str]]:
    text = values.mapping(content, "text")
    mine = values.number(text, "model", "perplexity")
    if mine is not None:
        other = values.number(text, "reference", "perplexity")
        ratio = values.number(text, "difference", "perplexity_ratio")
        change = NOT_MEASURED if ratio is None else f"{ratio:.4f} times"
        shown = NOT_MEASURED if other is None else measures.precise(other)
        yield ["perplexity", measures.precise(mine), shown, change, "", "", ""]
    kl = values.number(text, "kl", "mean")
    if kl is not None:
        spread = values.interval(text, "kl", "interval_95")
        shown = significant(kl) + _interval(spread, 1.0)
        yield ["KL divergence, nats", "", "", shown, "", "", ""]
    same = values.number(text, "top_1_agreement", "share")
    if same is not None:
        spread = values.interval(text, "top_1_agreement", "interval_95")
        shown = f"{percent(same)} %{_interval(spread, 100.0)}"
        yield ["same most probable token", "", "", shown, "", "", ""]


def _measures(content: Mapping[str, Any]) -> Iterator[list[str]]:
    """Accuracies, in percent."""
    for name in values.mapping(content, "measures"):
        entry = values.mapping(content, "measures", name)
        mine, other = (values.number(entry, of, "accuracy") for of in ("model", "reference"))
        found = values.mapping(entry, "difference")
        difference = values.number(found, "difference")
        change = NOT_MEASURED
        if difference is not None:
            spread = values.interval(found, "interval_95")
            change = measures.signed_with(difference, spread)
        counts = [values.number(found, each) for each in ("gained", "lost")]
        p = values.number(found, "mcnemar_p")
        yield [
            f"{name}, %",
            NOT_MEASURED if mine is None else percent(mine),
            NOT_MEASURED if other is None else percent(other),
            change,
            *(NOT_MEASURED if count is None else f"{count:.0f}" for count in counts),
            _shown(p),
        ]


def _shown(value: float | None) -> str:
    return NOT_MEASURED if value is None else significant(value)


def _interval(spread: tuple[float, float] | None, scale: float) -> str:
    if spread is None:
        return ""
    low, high = (significant(scale * each) for each in spread)
    return f" ({low} to {high})"


def _flips(record: Record, problems: list[str]) -> Iterator[list[str]]:
    """Rows of the file beside a report, if it is the one that was written with it."""
    described = values.mapping(record.content, "flipped")
    name = values.text(described, "file")
    if not name or name != Path(name).name or values.number(described, "bytes") is None:
        return
    path = record.path.parent / name
    try:
        if files.changed(path.parent, [described]):
            problems.append(f"{path}: it is missing, or not what {record.path.name} describes")
            return
        lines = regular.read_text(path).splitlines()
        for line in lines:
            row = json.loads(line)
            yield [values.text(row, column)[:_LONGEST] for column in _FLIPS]
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path}: it cannot be read: {error}")
