"""Sections about a quantized model's layers: ranges of weights and inputs, tokens of experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from post_training.reporting import charts, measures, values
from post_training.reporting.chain import Chain, Node
from post_training.reporting.document import Block, Figure, Section, Table, cut

_LAYER = re.compile(r"^(?P<before>.*?\.layers)\.(?P<number>\d+)\.(?P<own>.+)$")
_MOST_ROWS = 400
_MOST_SERIES = 12
_TITLES = {
    "weight": "largest weight",
    "input": "largest input, as calibrated",
    "keys": "largest key, as calibrated",
    "values": "largest value, as calibrated",
}

Ranges = dict[str, dict[str, list[tuple[int, float]]]]  # kind -> linear -> (layer, maximum)


def sections(chain: Chain) -> list[Section]:
    found = []
    for node in chain.outputs:
        if ranges := _by_kind(values.mapping(node.metrics, "ranges")):
            found.append(Section(f"Ranges by layer: {node.name}", _ranges(node, ranges)))
        tokens = _tokens(values.mapping(node.metrics, "calibration"))
        if tokens:
            found.append(Section(f"Tokens of experts: {node.name}", _experts(tokens)))
    return found


def _by_kind(recorded: Mapping[str, Any]) -> Ranges:
    found: Ranges = {}
    for name, maxima in recorded.items():
        place = _LAYER.match(name)
        if place is None or len(place["number"]) > 6 or not isinstance(maxima, Mapping):
            continue
        for kind in maxima:
            value = values.number(maxima, kind)
            if value is not None and kind in _TITLES:
                own = place["own"].removeprefix("self_attention.").removeprefix("mlp.")
                lines = found.setdefault(kind, {})
                lines.setdefault(own, []).append((int(place["number"]), value))
    return {kind: dict(sorted(lines.items())) for kind, lines in found.items()}


def _ranges(node: Node, ranges: Ranges) -> list[Block]:
    blocks: list[Block] = []
    rows: dict[tuple[int, str], dict[str, str]] = {}
    for kind, title in _TITLES.items():
        if kind not in ranges:
            continue
        blocks.append(_plot(title, ranges[kind]))
        for own, points in ranges[kind].items():
            for layer, value in points:
                rows.setdefault((layer, own), {})[kind] = measures.significant(value)
    kinds = [kind for kind in _TITLES if kind in ranges]
    cells = [
        [f"{layer} {own}", *(found.get(kind, "-") for kind in kinds)]
        for (layer, own), found in sorted(rows.items())
    ]
    caption = f"Largest magnitudes by layer of {node.name}"
    blocks.append(Table(caption, ["layer", *kinds], cut(cells, _MOST_ROWS), folded=True))
    return blocks


def _plot(title: str, by_linear: Mapping[str, list[tuple[int, float]]]) -> Figure:
    series = [
        charts.Series(own, sorted(points)) for own, points in list(by_linear.items())[:_MOST_SERIES]
    ]
    layers = [float(layer) for each in series for layer, _ in each.points]
    maxima = [value for each in series for _, value in each.points]
    positive = min(maxima) > 0
    x = charts.Axis.of("layer", layers, whole=True)
    y = charts.Axis.of(title, maxima, log=positive, zero=not positive)
    told = "; ".join(
        f"{each.name} {measures.significant(min(v for _, v in each.points))} to "
        f"{measures.significant(max(v for _, v in each.points))}"
        for each in series
    )
    scale = ", logarithmic" if y.log else ""
    names = [each.name for each in series]
    return Figure(f"{title}{scale}", charts.lines(series, x, y), f"{title}: {told}.", names)


def _tokens(calibration: Mapping[str, Any]) -> dict[int, tuple[list[float], list[float]]]:
    """By layer: tokens that the router sent to each expert, and those that were added."""
    found = {}
    for name in values.mapping(calibration, "expert_tokens"):
        routed = values.numbers(calibration, "expert_tokens", name)
        added = values.numbers(calibration, "expert_tokens_added", name)
        if routed and name.isdecimal() and len(name) < 7:
            found[int(name)] = (routed, added if len(added) == len(routed) else [])
    return dict(sorted(found.items()))


def _experts(tokens: Mapping[int, tuple[list[float], list[float]]]) -> list[Block]:
    parts: dict[str, Callable[[list[float]], float]] = {"least": min, "median": median, "most": max}
    series = [
        charts.Series(name, [(layer, float(of(routed))) for layer, (routed, _) in tokens.items()])
        for name, of in parts.items()
    ]
    counts = [value for each in series for _, value in each.points]
    x = charts.Axis.of("layer", [float(layer) for layer in tokens], whole=True)
    y = charts.Axis.of("tokens of an expert", counts, zero=True)
    idle = sum(not any(both) for routed, added in tokens.values() for both in _both(routed, added))
    total = sum(len(routed) for routed, _ in tokens.values())
    told = (
        f"Calibration tokens of the experts of {len(tokens)} layers: {min(counts):,.0f} to "
        f"{max(counts):,.0f}; {idle} of {total} experts got none."
    )
    rows = [
        [
            str(layer),
            f"{len(routed)}",
            *(f"{of(routed):,.0f}" for of in parts.values()),
            str(sum(not each for each in routed)),
            str(sum(not any(both) for both in _both(routed, added))),
        ]
        for layer, (routed, added) in tokens.items()
    ]
    columns = ["layer", "experts", *parts, "chosen for none", "calibrated on none"]
    figure = Figure("tokens of an expert, by layer", charts.lines(series, x, y), told, list(parts))
    return [figure, Table(told, columns, cut(rows, _MOST_ROWS), folded=len(rows) > 12)]


def _both(routed: list[float], added: list[float]) -> list[tuple[float, float]]:
    return list(zip(routed, added or [0.0] * len(routed), strict=True))
