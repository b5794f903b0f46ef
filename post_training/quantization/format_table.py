"""The tables of formats and engines: what ``export.sh --list-formats`` and docs/formats.md show.

No torch.
"""

from __future__ import annotations

from post_training.quantization.engines import registry as engines
from post_training.quantization.engines.base import GENERATIONS
from post_training.quantization.formats.base import Format
from post_training.quantization.formats.exportable import Verdict, verdict
from post_training.quantization.formats.registry import FORMATS, WEIGHTS

FORMAT_COLUMNS = (
    "format",
    "short name",
    "weights: bits",
    "inputs",
    "layers",
    "exported as",
    "for --target",
)
ENGINE_COLUMNS = ("exported as", "engine", *GENERATIONS, "how it is known", "loader")
_WIDTH = 160  # of what is written to a file or pipe


def format_rows() -> list[tuple[str, ...]]:
    """A row for each name of the command line, by :data:`FORMAT_COLUMNS`."""
    return [_format_row(row) for row in FORMATS.values()]


def _format_row(row: Format) -> tuple[str, ...]:
    if row.linear is None:
        inputs = f"keys and values: {row.kv}"
        return (row.name, "", "", inputs, "", "no: use --export-kv-cache-quant", "")
    found = {target: verdict(row, target=target) for target in engines.TARGETS}
    readers = [target for target, each in found.items() if each.exportable]
    shown = found[readers[0]] if readers else found[engines.DEFAULT]
    own = {found[target].quant_algo: target for target in readers[1:]}
    others = [f"{name} for {own[name]}" for name in own if name != shown.quant_algo]
    return (
        row.name,
        row.spellings[0],
        f"{row.linear.weight}: {WEIGHTS[row.linear.weight].bits:g}",
        row.linear.input or "16-bit",
        row.layers,
        ", ".join((_exported(shown), *others)),
        ", ".join(readers),
    )


def _exported(found: Verdict) -> str:
    return found.quant_algo if found.exportable else f"no: {found.reason}"


def engine_rows() -> list[tuple[str, ...]]:
    """A row for each algorithm of each engine, by :data:`ENGINE_COLUMNS`."""
    return [
        (
            algorithm,
            f"{engine.name} {engine.version_of(algorithm)}",
            *(engine.algorithms[algorithm].on(each) for each in GENERATIONS),
            engine.algorithms[algorithm].verified,
            engine.loader_of(algorithm),
        )
        for algorithm in engines.algorithms()
        for engine in engines.ENGINES
        if algorithm in engine.algorithms
    ]


def show() -> None:
    """Print both tables to stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    for title, columns, rows in (
        ("formats of quantize", FORMAT_COLUMNS, format_rows()),
        ("what engines read, and on which GPUs", ENGINE_COLUMNS, engine_rows()),
    ):
        table = Table(title=title, title_justify="left", title_style="bold")
        for number, column in enumerate(columns):
            table.add_column(column, overflow="fold", no_wrap=number == 0)
        for row in rows:
            table.add_row(*row)
        console.print(table)
