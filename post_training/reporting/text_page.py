"""A report as Markdown, for a repository or a pull request: the tables, and charts in words."""

from __future__ import annotations

from post_training.reporting.document import (
    Block,
    Code,
    Document,
    Facts,
    Figure,
    Items,
    Table,
    Text,
)
from post_training.reporting.markup import fenced, markdown
from post_training.reporting.page import GENERATOR

_MARK = f"<!-- {GENERATOR} -->"


def render(document: Document) -> str:
    parts = [_MARK, f"# {markdown(document.title)}", markdown(document.subtitle)]
    for section in document.sections:
        parts.append(f"## {markdown(section.title)}")
        parts += map(_block, section.blocks)
    return "\n\n".join(parts) + "\n"


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return markdown(block.text)
    if isinstance(block, Items):
        return "\n".join(f"- {markdown(each)}" for each in block.items)
    if isinstance(block, Facts):
        named = ((markdown(name), map(markdown, facts)) for name, facts in block.facts)
        return "\n".join(f"- **{name}**: {'; '.join(facts)}" for name, facts in named)
    if isinstance(block, Code):
        return f"{markdown(block.title)}:\n\n{fenced(block.code, 'sh')}"
    if isinstance(block, Figure):
        return markdown(block.alternative)
    return _table(block)


def _table(table: Table) -> str:
    rule = ["---:" if table.is_numeric(n) else "---" for n in range(len(table.columns))]
    rows = [list(map(markdown, table.columns)), rule, *(map(markdown, row) for row in table.rows)]
    grid = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    if not table.folded:
        return f"{markdown(table.caption)}\n\n{grid}"
    summary = f"<summary>{markdown(table.caption)}</summary>"
    return f"<details>{summary}\n\n{grid}\n\n</details>"
