"""Searches: size against KL divergence of all trials, and the command of the one recommended."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from post_training.common.report import number_of_bytes
from post_training.reporting import charts, plots, values
from post_training.reporting.document import NOT_MEASURED, Block, Code, Items, Section, Table, cut
from post_training.reporting.measures import percent, precise, significant
from post_training.reporting.records import Record

STAGE = "search"
_MOST_ROWS, _MOST_POINTS = 200, 60
_COLUMNS = ("trial", "bits per weight", "size", "of the whole", "KL divergence (95 %)")
_MORE = ("same top token, %", "perplexity", "")


def sections(records: Sequence[Record]) -> list[Section]:
    """A section for each report of a search among the records."""
    found = [each for each in records if each.stage == STAGE and not each.is_output]
    return [Section(f"Search: {each.path.parent.name}", list(_blocks(each))) for each in found]


def _blocks(record: Record) -> Iterator[Block]:
    content = record.content
    trials = [t for t in values.sequence(content, "trials") if isinstance(t, Mapping)]
    best = values.text(content, "recommended", "name")
    points = [
        charts.Point(
            values.text(each, "name"),
            size / 1e6,
            kl,
            values.interval(each, "text", "kl", "interval_95"),
            each.get("on_front") is True,
        )
        for each in trials
        if (size := _size(each)) is not None
        and (kl := values.number(each, "text", "kl", "mean")) is not None
    ][:_MOST_POINTS]
    if len(points) > 1:
        yield plots.plot("KL divergence", points)
    if command := values.text(content, "recommended", "command"):
        yield Code(f"Recommended, {best}", command)
    plain = values.number(content, "plain_bytes")
    rows = [_row(each, plain, best) for each in trials]
    if rows:
        caption = "Trials of the search, small ones first; sizes are those of the exported weights"
        counted = values.number(content, "budget", "cache_tokens")
        caption += f" and of {counted:,.0f} tokens' keys and values." if counted else "."
        yield Table(caption, (*_COLUMNS, *_MORE), cut(rows, _MOST_ROWS))
    if left := list(_left_out(content)):
        yield Items(left)


def _size(trial: Mapping[str, Any]) -> float | None:
    weights, cache = values.number(trial, "bytes"), values.number(trial, "cache_bytes")
    return None if weights is None else weights + (cache or 0.0)


def _row(trial: Mapping[str, Any], plain: float | None, best: str) -> list[str]:
    size, text = _size(trial), values.mapping(trial, "text")
    kl, bits = values.number(text, "kl", "mean"), values.number(trial, "bits_per_weight")
    spread = values.interval(text, "kl", "interval_95")
    same = values.number(text, "top_1_agreement", "share")
    perplexity = values.number(text, "model", "perplexity")
    divergence = NOT_MEASURED if kl is None else significant(kl)
    if spread is not None:
        divergence += f" ({significant(spread[0])} to {significant(spread[1])})"
    mark = "best of its size" if trial.get("on_front") is True else ""
    return [
        values.text(trial, "name"),
        NOT_MEASURED if bits is None else f"{bits:.2f}",
        NOT_MEASURED if size is None else number_of_bytes(size),
        NOT_MEASURED if size is None or not plain else f"{100 * size / plain:.0f} %",
        divergence,
        NOT_MEASURED if same is None else percent(same),
        NOT_MEASURED if perplexity is None else precise(perplexity),
        "recommended" if values.text(trial, "name") == best else mark,
    ]


def _left_out(content: Mapping[str, Any]) -> Iterator[str]:
    large = [each for each in values.sequence(content, "too_large") if isinstance(each, str)]
    if large:
        yield f"Larger than the budget, not measured: {', '.join(large)}"
    for title, name in (("Cannot be tried", "refused"), ("Failed", "failed")):
        for kind in values.mapping(content, name):
            yield f"{title}, {kind}: {values.text(content, name, kind)}"
