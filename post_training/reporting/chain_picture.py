"""The chain of stages as SVG: boxes from left to right, and a tree for a narrow screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from post_training.reporting.chain import MODEL, Chain, Node
from post_training.reporting.charts import picture, shortened_text
from post_training.reporting.markup import element

_WIDE, _HIGH, _GAP, _APART = 176, 66, 46, 18  # a box, and the room between boxes
_ROW, _INDENT, _NARROW = 54, 18, 340
_LETTERS = {"name": 23, "label": 27, "note": 29}  # that fit into a box


@dataclass(frozen=True)
class Lines:
    """What a box says: a name, what made it, what was measured."""

    name: str
    made: str
    measured: str


@dataclass(frozen=True)
class _Place:
    column: int
    row: int


def wide(chain: Chain, describe: Callable[[Node], Lines]) -> str:
    """Boxes, in a column for each step from a source."""
    places = _places(chain)
    parts: list[str] = []
    for node in chain.nodes:
        for link in node.links:
            solid = link.role == MODEL
            style = ("link" if solid else "link other") + ("" if link.current else " old")
            parts.append(_curve(places[id(link.node)], places[id(node)], style))
    for node in chain.nodes:
        x, y = _corner(places[id(node)])
        kind = "box" if node.record else "box source"
        size = {"width": _WIDE, "height": _HIGH, "rx": 8}
        parts.append(element("rect", x=x, y=y, class_=kind, **size))
        parts += _texts(describe(node), x + 11, y + 20, cut=True)
    columns = 1 + max(place.column for place in places.values())
    rows = 1 + max(place.row for place in places.values())
    width = columns * (_WIDE + _GAP) - _GAP + 4
    svg = picture(width, rows * (_HIGH + _APART) - _APART + 4, parts)
    # Not scaled to the page: it scrolls in its own box where it is wider.
    return svg.replace("<svg ", f'<svg width="{width}" ', 1)


def narrow(chain: Chain, describe: Callable[[Node], Lines]) -> str:
    """A line for each output, indented below what it was made from."""
    parts: list[str] = []
    height = 0

    def draw(node: Node, depth: int, above: int) -> None:
        nonlocal height
        x, y = 10 + depth * _INDENT, 14 + height
        height += _ROW
        if depth:
            corner = f"M{x - _INDENT} {above + 6} V{y} H{x - 6}"
            parts.append(element("path", d=corner, class_="link"))
        ring = "c0 dot" if node.record else "c0 ring"
        parts.append(element("circle", cx=x, cy=y, r=5, class_=ring))
        parts.extend(_texts(describe(node), x + 14, y + 4, cut=False))
        for child in chain.children(node):
            draw(child, min(depth + 1, 8), y)

    for node in chain.nodes:
        if node.parent is None:
            draw(node, 0, 0)
    return picture(_NARROW, height + 4, parts)


def _texts(lines: Lines, x: float, y: float, *, cut: bool) -> Sequence[str]:
    rows = (("name", lines.name), ("label", lines.made), ("note", lines.measured))
    return [
        element(
            "text",
            shortened_text(text, _LETTERS[class_] if cut else 52),
            x=x,
            y=y + 17 * number,
            class_=class_,
        )
        for number, (class_, text) in enumerate(rows)
    ]


def _places(chain: Chain) -> dict[int, _Place]:
    """A line of outputs stays in its row; a further one made from the same model gets a new row."""
    found: dict[int, _Place] = {}
    rows = 0
    used: set[int] = set()  # nodes whose row a child goes on in
    for node in chain.nodes:
        column = max((1 + found[id(link.node)].column for link in node.links), default=0)
        parent = node.parent
        if parent is not None and id(parent) not in used:
            used.add(id(parent))
            row = found[id(parent)].row
        else:
            row, rows = rows, rows + 1
        found[id(node)] = _Place(column, row)
    return found


def _corner(place: _Place) -> tuple[int, int]:
    return 2 + place.column * (_WIDE + _GAP), 2 + place.row * (_HIGH + _APART)


def _curve(start: _Place, end: _Place, style: str) -> str:
    """From the right of a box to the left of another."""
    (x1, y1), (x2, y2) = _corner(start), _corner(end)
    x1, y1, y2 = x1 + _WIDE, y1 + _HIGH // 2, y2 + _HIGH // 2
    middle = x2 - _GAP // 2
    path = f"M{x1} {y1} C{middle} {y1} {middle} {y2} {x2} {y2}"
    if style.startswith("link other"):  # past the boxes of the columns between
        path = f"M{x1} {y1 + 16} C{x1 + _GAP} {y1 + 16} {x2 - _GAP} {y2 + 16} {x2} {y2 + 16}"
    return element("path", d=path, class_=style)
