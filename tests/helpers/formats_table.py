"""The tables of docs/formats.md, made from the registries. As a program it prints them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from post_training.quantization import format_table


def markdown_table() -> str:
    """A line a format, then one an exported algorithm and engine."""
    rows = format_table.format_rows()
    named = [(f"`{row[0]}`", row[1] and f"`{row[1]}`", *row[2:]) for row in rows]
    lines = _table(format_table.FORMAT_COLUMNS, named)
    lines += ["", *_table(format_table.ENGINE_COLUMNS, format_table.engine_rows())]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, *rows)]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:]]


if __name__ == "__main__":
    print(markdown_table())
