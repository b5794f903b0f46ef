"""Charts as SVG: points, lines and bars.

Colours are classes of the page's style, which has them for both themes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from post_training.reporting.markup import element, escape, shortened

COLOURS = 8  # classes c0 to c7; further series take them again, with another dash
WIDTH, HEIGHT = 360, 236
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 12, 40
_TICKS = 5
_DECADES = 20  # times that the largest number is the smallest, for a logarithmic axis
_MOST_POINTS = 600  # of a line: more than there are pixels say nothing
_FEW = 40  # points of a line that get markers
_LETTER = 6.9  # width of a letter of a label


@dataclass(frozen=True)
class Point:
    """A point with a name, and the ends of a bar of its y; ``best`` are joined by a line."""

    name: str
    x: float
    y: float
    interval: tuple[float, float] | None = None
    best: bool = False


@dataclass(frozen=True)
class Series:
    """A line; a ``dashed`` one has the colour of the one before it, and rings at its points."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """Values from ``low`` to ``high``; ``log`` shows powers of ten."""

    title: str
    low: float
    high: float
    log: bool = False
    whole: bool = False
    ticks: list[float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ticks", self._ticks())

    @classmethod
    def of(cls, title: str, numbers: Sequence[float], *, log: bool = False, whole: bool = False,
           zero: bool = False) -> Axis:  # fmt: skip
        """Around the numbers; ``zero`` is shown too."""
        log = log and min(numbers) > 0 and max(numbers) > _DECADES * min(numbers)
        low, high = min(numbers), max(numbers)
        if log:
            low, high = low / 1.15, high * 1.15
        else:
            low = min(low, 0.0) if zero else low
            margin = 0.06 * (high - low) or abs(high) * 0.1 or 1.0
            low, high = (low if zero and low >= 0 else low - margin), high + margin
        if whole:
            low, high = math.floor(min(numbers)), max(math.ceil(max(numbers)), min(numbers) + 1)
        return cls(title, low, high, log, whole)

    def place(self, value: float) -> float:
        """0 at the low end, 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def _ticks(self) -> list[float]:
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            digits = (1, 2, 5) if last - first < 4 else (1,)
            found = [n * 10.0**power for power in range(first, last + 1) for n in digits]
            found = [each for each in found if self.low <= each <= self.high]
            return found[:: math.ceil(len(found) / 7)]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / _TICKS))
        step = next(
            each
            for each in (step, 2 * step, 5 * step, 10 * step)
            if (self.high - self.low) / each <= _TICKS
        )
        step = max(1.0, round(step)) if self.whole else step
        first = math.ceil(self.low / step - 1e-9)
        count = math.floor(self.high / step + 1e-9) - first
        return [(first + n) * step for n in range(count + 1)]


def tick(value: float) -> str:
    """A number at an axis: 12, 0.05, 2k."""
    if value == 0:
        return "0"
    if abs(value) >= 1e4 or abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-")
    return f"{value:.4g}"


class Frame:
    """Axes, and where values lie between them."""

    def __init__(self, x: Axis, y: Axis) -> None:
        self.x, self.y = x, y
        self.parts: list[str] = []
        for value in y.ticks:
            at = self.down(value)
            self._line(_LEFT, at, WIDTH - _RIGHT, at, "grid")
            self.text(_LEFT - 5, at + 3.5, tick(value), "end")
        for value in x.ticks:
            at = self.across(value)
            self._line(at, HEIGHT - _BOTTOM, at, HEIGHT - _BOTTOM + 4, "axis")
            self.text(at, HEIGHT - _BOTTOM + 15, tick(value), "middle")
        self._line(_LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, HEIGHT - _BOTTOM, "axis")
        self.text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x.title, "middle", "title")

    def across(self, value: float) -> float:
        return _LEFT + self.x.place(value) * (WIDTH - _LEFT - _RIGHT)

    def down(self, value: float) -> float:
        return HEIGHT - _BOTTOM - self.y.place(value) * (HEIGHT - _TOP - _BOTTOM)

    def text(self, x: float, y: float, text: str, anchor: str, class_: str = "tick") -> None:
        where = {"x": f"{x:.1f}", "y": f"{y:.1f}", "text_anchor": anchor, "class_": class_}
        self.parts.append(element("text", shortened_text(text), **where))

    def _line(self, x1: float, y1: float, x2: float, y2: float, class_: str) -> None:
        ends = {"x1": x1, "y1": y1, "x2": x2, "y2": y2}
        at = {name: f"{value:.1f}" for name, value in ends.items()}
        self.parts.append(element("line", class_=class_, **at))

    def path(self, points: Sequence[tuple[float, float]], class_: str) -> None:
        at = [f"{self.across(x):.1f} {self.down(y):.1f}" for x, y in points]
        self.parts.append(element("path", d="M" + " L".join(at), class_=class_))

    def marker(self, x: float, y: float, class_: str, radius: float = 4.0) -> None:
        at = {"cx": f"{self.across(x):.1f}", "cy": f"{self.down(y):.1f}", "r": radius}
        self.parts.append(element("circle", class_=class_, **at))

    def error(self, x: float, low: float, high: float, class_: str) -> None:
        at = self.across(x)
        ends = [min(max(each, self.y.low), self.y.high) for each in (low, high)]
        self._line(at, self.down(ends[0]), at, self.down(ends[1]), class_)

    def svg(self) -> str:
        return picture(WIDTH, HEIGHT, self.parts)


def picture(width: float, height: float, parts: Sequence[str]) -> str:
    """The whole; the page says in words beside it what it shows."""
    box = f"0 0 {width:.0f} {height:.0f}"
    # Hidden from screen readers, which get the figure's alternative.
    return element("svg", *parts, viewBox=box, class_="chart", aria_hidden="true")


def shortened_text(text: str, most: int = 60) -> str:
    return escape(shortened(text, most))


def scatter(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Points with names; the ``best`` ones joined."""
    frame = Frame(x, y)
    best = sorted((each.x, each.y) for each in points if each.best)
    if len(best) > 1:
        frame.path(best, "front")
    for each in points:
        if each.interval is not None:
            frame.error(each.x, *each.interval, "error")
    for each in points:
        frame.marker(each.x, each.y, "c0 dot" if each.best else "c0 ring", 4.5)
    _label(frame, points)
    return frame.svg()


def _label(frame: Frame, points: Sequence[Point]) -> None:
    """Names beside their points, where nothing else is; left out where there is no room."""
    taken = [
        (frame.across(each.x) - 5, frame.down(each.y) - 5, frame.across(each.x) + 5,
         frame.down(each.y) + 5)
        for each in points
    ]  # fmt: skip
    for each in points:
        name = shortened(each.name, 22)
        wide, x, y = _LETTER * len(name), frame.across(each.x), frame.down(each.y)
        for left, base in (
            *((x + 8, y + 4), (x - 8 - wide, y + 4), (x - wide / 2, y - 9)),
            *((x - wide / 2, y + 18), (x + 8, y - 8), (x + 8, y + 16)),
            *((x - 8 - wide, y - 8), (x - 8 - wide, y + 16)),
        ):
            box = (left, base - 10, left + wide, base + 3)
            inside = box[0] >= _LEFT and box[2] <= WIDTH and box[1] >= 0
            inside = inside and box[3] <= HEIGHT - _BOTTOM + 2
            if inside and not any(_overlap(box, other) for other in taken):
                frame.text(left, base, name, "start", "label")
                taken.append(box)
                break


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def lines(series: Sequence[Series], x: Axis, y: Axis) -> str:
    """A line for each series, in the order of the colours."""
    frame = Frame(x, y)
    number = -1
    for each in series:
        number += 0 if each.dashed and number >= 0 else 1
        every = math.ceil(len(each.points) / _MOST_POINTS)
        points = list(each.points[::every])
        colour = f"c{number % COLOURS}"
        style = " dash" if each.dashed or number >= COLOURS else ""
        if len(points) > 1:
            frame.path(points, f"{colour} line{style}")
        if len(points) < _FEW:
            for point in points:
                frame.marker(*point, f"{colour} {'ring' if each.dashed else 'dot'}", 2.6)
    return frame.svg()


@dataclass(frozen=True)
class Bar:
    name: str
    value: float
    interval: tuple[float, float] | None = None
    shown: str = ""


def bars(rows: Sequence[Bar], most: float, least: float = 0.0) -> str:
    """Horizontal bars from ``least``, with intervals and the value at the right."""
    height, left, right = 26, 104, 52
    whole = WIDTH - left - right
    parts: list[str] = []

    def across(value: float) -> float:
        share = (min(max(value, least), most) - least) / ((most - least) or 1)
        return left + share * whole

    for number, row in enumerate(rows):
        top = 4 + number * height
        name = {"x": left - 6, "y": top + 14, "text_anchor": "end", "class_": "label"}
        parts.append(element("text", shortened_text(row.name, 16), **name))
        wide = f"{across(row.value) - left:.1f}"
        parts.append(element("rect", x=left, y=top, width=whole, height=18, class_="track"))
        parts.append(element("rect", x=left, y=top, width=wide, height=18, class_="c0 bar"))
        if row.interval is not None:
            low, high = (f"{across(each):.1f}" for each in row.interval)
            at = {"x1": low, "x2": high, "y1": top + 9, "y2": top + 9}
            parts.append(element("line", class_="error", **at))
        end = {"x": WIDTH - right + 6, "y": top + 14, "class_": "label"}
        parts.append(element("text", shortened_text(row.shown, 8), **end))
    return picture(WIDTH, 6 + height * len(rows), parts)
