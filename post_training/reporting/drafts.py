"""Sections about drafts: what was accepted, by position and by category."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from post_training.reporting import charts, measures, values
from post_training.reporting.chain import Chain
from post_training.reporting.document import NOT_MEASURED, Block, Figure, Section, Table, cut

_MOST_BARS = 20
_MOST_ROWS = 200


def sections(chain: Chain) -> list[Section]:
    found = []
    for node in chain.nodes:
        measured = measures.acceptance(node)
        if measured is not None:
            acceptance = values.mapping(measured.record.content, "acceptance")
            steps = values.number(measured.record.content, "settings", "steps")
            blocks = _blocks(acceptance, steps or 0)
            found.append(Section(f"Acceptance of the draft: {node.name}", blocks))
    return found


def _blocks(acceptance: Mapping[str, Any], steps: float) -> list[Block]:
    blocks: list[Block] = []
    shares = values.numbers(acceptance, "acceptance_rate_by_position")[:_MOST_BARS]
    if shares:
        rows = [
            charts.Bar(f"position {number}", share, shown=f"{share:.3f}")
            for number, share in enumerate(shares, start=1)
        ]
        told = "; ".join(f"position {n} {share:.3f}" for n, share in enumerate(shares, start=1))
        title = "share of draft tokens accepted, by position"
        blocks.append(Figure(title, charts.bars(rows, 1.0), f"Accepted shares: {told}."))
    lengths = _lengths(acceptance)
    most = max([steps + 1, *(bar.value for bar in lengths)], default=1.0)
    if len(lengths) > 1:
        told = "; ".join(f"{bar.name} {bar.shown}" for bar in lengths)
        title = "acceptance length, by category"
        shown = charts.bars(lengths[:_MOST_BARS], most, least=1.0)
        blocks.append(Figure(title, shown, f"Acceptance lengths: {told}."))
    blocks.append(_table(acceptance))
    return blocks


def _rows(acceptance: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    categories = values.mapping(acceptance, "categories")
    return {**{name: values.mapping(categories, name) for name in categories}, "all": acceptance}


def _lengths(acceptance: Mapping[str, Any]) -> list[charts.Bar]:
    found = []
    for name, each in _rows(acceptance).items():
        length = values.number(each, "acceptance_length")
        if length is not None:
            spread = values.interval(each, "interval_95")
            found.append(charts.Bar(name, length, spread, f"{length:.2f}"))
    return found


def _table(acceptance: Mapping[str, Any]) -> Table:
    rows = []
    for name, each in _rows(acceptance).items():
        length, answers = (values.number(each, key) for key in ("acceptance_length", "answers"))
        spread = values.interval(each, "interval_95")
        rate = values.number(each, "acceptance_rate")
        rows.append(
            [
                name,
                NOT_MEASURED if length is None else f"{length:.2f}",
                f"{spread[0]:.2f} to {spread[1]:.2f}" if spread else NOT_MEASURED,
                NOT_MEASURED if rate is None else f"{rate:.3f}",
                NOT_MEASURED if answers is None else f"{answers:.0f}",
            ]
        )
    identical = values.number(acceptance, "identical_answers")
    answers = values.number(acceptance, "answers")
    caption = "Acceptance length: tokens per pass of the model."
    if identical is not None and answers is not None:
        caption += f" {identical:.0f} of {answers:.0f} answers are those of decoding without it."
    speed_up = values.number(acceptance, "speed_up")
    if speed_up is not None:
        caption += f" Measured speed: {speed_up:.2f} times decoding without it."
    columns = ["category", "acceptance length", "95 % interval", "acceptance rate", "answers"]
    return Table(caption, columns, cut(rows, _MOST_ROWS))
