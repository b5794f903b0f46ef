"""What a report consists of, before it is HTML or Markdown. All texts are plain."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

NOT_MEASURED = "-"
MINUS = "\N{MINUS SIGN}"
_NUMERIC = re.compile(rf"[-+{MINUS}]?\d.*|-|")


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Facts:
    """What is to be known of each of several things, by its name."""

    facts: Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Code:
    """Lines for a shell; ``title`` says what they make."""

    title: str
    code: str


@dataclass(frozen=True)
class Table:
    """A table; the first column names the row.

    Attributes:
        caption: what it shows.
        columns: their headings.
        rows: a cell for each column.
        folded: it is shown when it is asked for.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers only, which are aligned at the right."""
        return column > 0 and all(_NUMERIC.fullmatch(row[column]) for row in self.rows)


@dataclass(frozen=True)
class Figure:
    """A picture.

    Attributes:
        title: above it.
        svg: markup, made by ``charts`` or ``chain_picture``.
        alternative: what it shows, for those who do not see it.
        legend: names of its series, in the order of their colours.
        narrow: the same for a narrow screen, where it is another picture.
        wide: it may take the whole width.
    """

    title: str
    svg: str
    alternative: str
    legend: Sequence[str] = ()
    narrow: str = ""
    wide: bool = False


Block = Text | Items | Facts | Code | Table | Figure


@dataclass(frozen=True)
class Section:
    """A heading and what is below it."""

    title: str
    blocks: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Document:
    title: str
    subtitle: str
    sections: list[Section]


def cut(rows: Sequence[Sequence[str]], most: int) -> list[Sequence[str]]:
    """The first rows of a table, and how many there are more."""
    if len(rows) <= most:
        return list(rows)
    rest = [""] * (len(rows[0]) - 1)
    return [*rows[:most], [f"{len(rows) - most:,} more", *rest]]
