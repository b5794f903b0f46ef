"""Plots of quality by size, and which points of them are on the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence

from post_training.reporting import charts
from post_training.reporting.document import Figure


def plot(title: str, points: Sequence[charts.Point]) -> Figure:
    """A quantity by size; ``x`` of the points in MB."""
    ends = [value for each in points for value in (each.y, *(each.interval or ()))]
    unit, divisor = ("GB", 1e3) if max(each.x for each in points) >= 1e3 else ("MB", 1.0)
    points = [
        charts.Point(each.name, each.x / divisor, each.y, each.interval, each.best)
        for each in points
    ]
    x = charts.Axis.of(f"weights, {unit}", [each.x for each in points], zero=True)
    y = charts.Axis.of(title, ends)
    listed = "; ".join(f"{each.name} {each.x:.3g} {unit}, {each.y:.3g}" for each in points)
    best = ", ".join(each.name for each in points if each.best)
    return Figure(
        f"{title} by size of the weights",
        charts.scatter(points, x, y),
        f"{title} by size: {listed}. None is smaller and better than: {best}.",
    )


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of points (size, quality), whether no other is as small and as good, and better in one."""
    return [
        not any(
            other[0] <= x and other[1] >= y and (other[0] < x or other[1] > y) for other in points
        )
        for x, y in points
    ]
