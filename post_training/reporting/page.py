"""A report as one HTML page: no script, nothing from elsewhere, both themes, wide and narrow."""

from __future__ import annotations

import re
from collections.abc import Sequence

from post_training.reporting.charts import COLOURS
from post_training.reporting.document import (
    Block,
    Code,
    Document,
    Facts,
    Figure,
    Items,
    Section,
    Table,
    Text,
)
from post_training.reporting.markup import element, escape

GENERATOR = "post_training report"  # in each page: it may be replaced by the next one

# Okabe and Ito's colours, which people with any kind of colour vision tell apart, made darker for
# the light theme and lighter for the dark one.
_LIGHT = "#0b62a8 #b4460a #00795c #8f3f7f #8a6a00 #2b7fae #5c5c5c #a3273a".split()
_DARK = "#6bb3f2 #f2935a #45c9a2 #e08fcb #e3c04a #8fd3f5 #b5b5b5 #f28b99".split()

_STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fff; --panel: #f6f7f9; --text: #1c2127; --muted: #59626e; --rule: #d5dae1;
  --accent: #0b62a8; LIGHT
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --panel: #1d2127; --text: #e6e9ee; --muted: #a3adb9; --rule: #39414b;
    --accent: #6bb3f2; DARK
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Noto Sans", sans-serif;
}
header, main { max-width: 1180px; margin: 0 auto; padding: 0 16px; }
header { padding-top: 24px; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 40px 0 10px; padding-top: 10px; border-top: 1px solid var(--rule);
  overflow-wrap: anywhere; }
p, li { max-width: 80ch; overflow-wrap: anywhere; }
ul { padding-left: 20px; } li { margin: 4px 0; }
.subtitle, figcaption.told { color: var(--muted); margin: 0; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 16px; }
nav li { margin: 0; }
a { color: var(--accent); }
a:focus-visible, summary:focus-visible, .scroll:focus-visible, pre:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px;
}
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .86rem; }
caption { text-align: left; caption-side: top; color: var(--muted); padding: 8px 12px; }
th, td { padding: 6px 11px; text-align: left; vertical-align: top; white-space: nowrap;
  border-top: 1px solid var(--rule); }
thead th { border-top: 0; background: var(--panel); font-weight: 600; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--ground); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
td.long { white-space: normal; min-width: 30ch; overflow-wrap: anywhere; }
.words { padding: 8px 12px; color: var(--muted); font-size: .9rem; margin: 0; max-width: none; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr));
  gap: 16px; }
.card { background: var(--panel); border-radius: 8px; padding: 12px 16px;
  border-left: 4px solid var(--accent); }
.card h3 { font-size: 1rem; margin: 0 0 4px; overflow-wrap: anywhere; }
.card ul { margin: 0; padding-left: 18px; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr));
  gap: 16px; }
figure { margin: 0 0 12px; min-width: 0; }
.charts figure { background: var(--panel); border-radius: 8px; padding: 12px; max-width: 480px; }
figure h3 { font-size: .95rem; margin: 0 0 6px; }
svg.chart { display: block; max-width: 100%; height: auto; }
.charts svg.chart { width: 100%; }
.wide { overflow-x: auto; } .wide svg.chart { max-width: none; }
.narrow { display: none; }
@media (max-width: 700px) {
  .wide { display: none; } .narrow { display: block; } .narrow svg.chart { width: 100%; }
  h2 { margin-top: 28px; }
}
svg text { font-family: inherit; fill: var(--text); font-size: 11px; }
svg .tick, svg .title, svg .note { fill: var(--muted); }
svg .name { font-size: 13px; font-weight: 600; } svg .label { font-size: 11.5px; }
.charts svg .label { paint-order: stroke; stroke: var(--panel); stroke-width: 3px; }
svg .grid { stroke: var(--rule); stroke-width: 1; } svg .axis { stroke: var(--muted); }
svg .error { stroke: var(--text); stroke-width: 1.4; opacity: .7; }
svg .front { fill: none; stroke: var(--muted); stroke-width: 1.4; stroke-dasharray: 5 4; }
svg .line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
svg .dash { stroke-dasharray: 5 4; } svg .dot { fill: var(--c); }
svg .ring { fill: var(--ground); stroke: var(--c); stroke-width: 2; }
svg .track { fill: var(--rule); opacity: .45; } svg .bar { fill: var(--c); opacity: .8; }
svg .box { fill: var(--panel); stroke: var(--accent); stroke-width: 1.5; }
svg .source { stroke: var(--muted); stroke-dasharray: 4 3; }
svg .link { fill: none; stroke: var(--muted); stroke-width: 1.8; }
svg .other { stroke-dasharray: 6 4; } svg .old { stroke-dasharray: 1 5; stroke-linecap: round; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 14px; padding: 0;
  margin: 6px 0 0; font-size: .85rem; }
.legend li { margin: 0; } .legend span { display: inline-block; width: 14px; height: 4px;
  border-radius: 2px; background: var(--c); margin-right: 6px; vertical-align: middle; }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
  white-space: nowrap; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); }
pre { background: var(--panel); border-radius: 8px; padding: 10px 12px; margin: 4px 0 14px;
  overflow-x: auto; font-size: .82rem; }
.made { margin: 10px 0 0; font-weight: 600; }
footer { color: var(--muted); max-width: 1180px; margin: 40px auto 24px; padding: 0 16px; }
@media print { details > * { display: block; } body { font-size: 11px; } }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_LONG = 60  # characters of a cell that is broken into lines


def render(document: Document) -> str:
    """The whole page."""
    numbered = list(enumerate(document.sections, start=1))
    links = "".join(
        element("li", element("a", escape(section.title), href=f"#s{number}"))
        for number, section in numbered
    )
    nav = element("nav", element("ul", links), aria_label="Sections")
    title = element("h1", escape(document.title))
    subtitle = element("p", escape(document.subtitle), class_="subtitle")
    sections = "\n".join(_section(number, section) for number, section in numbered)
    said = "Figures are what stages recorded; - was not measured. Nothing is loaded from elsewhere."
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta name="generator" content="{GENERATOR}">',
            element("title", escape(document.title)),
            element("style", _style()),
            "</head><body>",
            element("header", title, subtitle, nav),
            element("main", sections),
            element("footer", said),
            "</body></html>\n",
        )
    )


def _style() -> str:
    colours = [
        " ".join(f"--c{number}: {colour};" for number, colour in enumerate(each))
        for each in (_LIGHT, _DARK)
    ]
    classes = "\n".join(f".c{number} {{ --c: var(--c{number}); }}" for number in range(COLOURS))
    return _STYLE.replace("LIGHT", colours[0]).replace("DARK", colours[1]) + classes


def _section(number: int, section: Section) -> str:
    heading = element("h2", escape(section.title), id=f"s{number}")
    parts: list[str] = []
    pending: list[str] = []  # small charts stand side by side
    for block in section.blocks:
        if isinstance(block, Figure) and not block.wide:
            pending.append(_figure(block))
            continue
        if pending:
            parts.append(element("div", *pending, class_="charts"))
            pending = []
        parts.append(_block(block))
    if pending:
        parts.append(element("div", *pending, class_="charts"))
    return element("section", heading, "\n".join(parts), aria_labelledby=f"s{number}")


def _block(block: Block) -> str:
    if isinstance(block, Text):
        return element("p", escape(block.text))
    if isinstance(block, Items):
        return element("ul", *(element("li", escape(each)) for each in block.items))
    if isinstance(block, Facts):
        return element("div", *(_card(name, facts) for name, facts in block.facts), class_="cards")
    if isinstance(block, Code):
        title = element("p", escape(block.title), class_="made")
        code = element("code", escape(block.code))
        return title + element("pre", code, tabindex=0)
    if isinstance(block, Table):
        return _table(block)
    return _figure(block)


def _card(name: str, facts: Sequence[str]) -> str:
    listed = "".join(element("li", escape(fact)) for fact in facts)
    return element("div", element("h3", escape(name)), element("ul", listed), class_="card")


def _figure(figure: Figure) -> str:
    title = element("h3", escape(figure.title)) if figure.title else ""
    told = element("figcaption", escape(figure.alternative), class_="hidden")
    legend = "".join(
        element("li", element("span", class_=f"c{number % COLOURS}"), escape(name))
        for number, name in enumerate(figure.legend)
    )
    listed = element("ul", legend, class_="legend") if len(figure.legend) > 1 else ""
    picture = figure.svg
    if figure.narrow:
        wide = element("div", figure.svg, class_="wide", tabindex=0, role="group",
                       aria_label=figure.alternative[:200])  # fmt: skip
        picture = wide + element("div", figure.narrow, class_="narrow")
    return element("figure", title, picture, listed, told)


def _table(table: Table) -> str:
    numeric = [table.is_numeric(column) for column in range(len(table.columns))]
    kinds = ["number" if each else None for each in numeric]
    heads = (
        element("th", escape(name), scope="col", class_=kind)
        for name, kind in zip(table.columns, kinds, strict=True)
    )
    rows = (_row(row, kinds) for row in table.rows)
    body = element("thead", element("tr", *heads)) + element("tbody", *rows)
    name = re.sub(r"\s+", " ", table.caption)
    caption = element("p", escape(table.caption), class_="words")
    grid = element("table", element("caption", escape(name), class_="hidden"), body)
    label = {"role": "region", "tabindex": 0, "aria_label": name[:120]}
    box = element("div", grid, class_="scroll", **label)
    if not table.folded:
        return caption + box
    summary = element("summary", escape(f"{table.caption} ({len(table.rows):,} rows)"))
    return element("details", summary, box)


def _row(row: Sequence[str], kinds: Sequence[str | None]) -> str:
    first, *others = row
    cells = [element("th", escape(first), scope="row")]
    for text, kind in zip(others, kinds[1:], strict=True):
        long = "long" if len(text) > _LONG else None
        cells.append(element("td", escape(text), class_=kind or long))
    return element("tr", *cells)
