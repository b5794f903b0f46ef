"""Sections about training: metrics by iteration, from the files of the runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.common.errors import UsageError
from post_training.reporting import charts, measures, values
from post_training.reporting.chain import Chain, Node
from post_training.reporting.document import Block, Figure, Section, Table, Text, cut
from post_training.training import metrics, run_folder

_MOST_ROWS = 300
_MOST_PANELS = 9
_NOT_DRAWN = (*metrics.MACHINE, "iteration", "samples", "kind")


def sections(chain: Chain, problems: list[str]) -> list[Section]:
    """A section for each run; what cannot be read is added to ``problems``."""
    found = []
    for node in chain.outputs:
        folder = Path(node.path) / run_folder.FOLDER
        try:
            lines = metrics.read(folder)
        except (UsageError, OSError) as error:
            problems.append(str(error.args[0]) if isinstance(error, UsageError) else str(error))
            continue
        lines = [each for each in lines if values.number(each, "iteration") is not None]
        if lines:
            found.append(Section(f"Training: {node.name}", _blocks(node, lines)))
    return found


def _blocks(node: Node, lines: Sequence[Mapping[str, Any]]) -> list[Block]:
    blocks: list[Block] = []
    drawn: list[list[Sequence[tuple[float, float]]]] = []
    for title, names in list(metrics.panels(lines).items())[:_MOST_PANELS]:
        series = _series(names, lines)
        points = [each.points for each in series]
        # The loss may have one part only; a single point is in the table.
        if max(map(len, points), default=0) > 1 and points not in drawn:
            drawn.append(points)
            blocks.append(_panel(title, series))
    if node.content.get("complete") is False:
        done = values.number(node.metrics, "iteration")
        blocks.insert(0, Text(f"Unfinished: saved at iteration {done or 0:,.0f}."))
    columns = sorted({name for each in lines for name in each if name not in _NOT_DRAWN})[:16]
    rows = [
        [
            f"{values.number(each, 'iteration'):,.0f} {values.text(each, 'kind')}",
            *(_cell(values.number(each, name)) for name in columns),
        ]
        for each in lines
    ]
    caption = f"Metrics of {node.name} by iteration"
    blocks.append(Table(caption, ["iteration", *columns], cut(rows, _MOST_ROWS), folded=True))
    return blocks


def _cell(value: float | None) -> str:
    return "-" if value is None else measures.significant(value)


def _series(names: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> list[charts.Series]:
    series: list[charts.Series] = []
    for name in names:
        for kind in ("train", "eval"):
            points = [
                (iteration, value)
                for each in lines
                if each.get("kind") == kind
                and (value := values.number(each, name)) is not None
                and (iteration := values.number(each, "iteration")) is not None
            ]
            label = name if kind == "train" else f"{name}, held out"
            if points:
                after = kind == "eval" and bool(series) and series[-1].name == name
                series.append(charts.Series(label, points, dashed=after))
    return series


def _panel(title: str, series: Sequence[charts.Series]) -> Figure:
    numbers = [value for each in series for _, value in each.points]
    x = charts.Axis.of("iteration", [x for each in series for x, _ in each.points], zero=True)
    y = charts.Axis.of(title, numbers, log=True)
    told = "; ".join(
        f"{each.name} from {measures.significant(each.points[0][1])} to "
        f"{measures.significant(each.points[-1][1])}"
        for each in series
    )
    shown = charts.lines(series, x, y)
    heading = f"{title}, logarithmic" if y.log else title
    heading += " (rings: held out)" if any(each.dashed for each in series) else ""
    names = [each.name for each in series if not each.dashed]
    return Figure(heading, shown, f"{title} by iteration: {told}.", names)
