"""The tables of docs/formats.md, made from the registries. As a program it prints them."""

from __future__ import annotations

from post_training.quantization.engines import registry as engines
from post_training.quantization.formats.exportable import verdict
from post_training.quantization.formats.registry import FORMATS, WEIGHTS


def markdown_table() -> str:
    """A line a format, then one an exported algorithm with its engines and GPUs."""
    lines = [
        "| format | short name | weights: bits | inputs | layers | exported as |",
        "|---|---|---|---|---|---|",
    ]
    for row in FORMATS.values():
        if row.linear is None:
            cells = ["", "", f"keys and values: {row.kv}", "", "no: use --export-kv-cache-quant"]
        else:
            bits = f"{row.linear.weight}: {WEIGHTS[row.linear.weight].bits:g}"
            found = verdict(row)
            exported = found.quant_algo if found.exportable else f"no: {found.reason}"
            short = f"`{row.spellings[0]}`"
            cells = [short, bits, row.linear.input or "16-bit", row.layers, exported]
        lines.append(f"| `{row.name}` | {' | '.join(cells)} |")
    lines += ["", "| exported as | engines | GPUs |", "|---|---|---|"]
    lines += [f"| {name} | {' | '.join(engines.describe(name))} |" for name in engines.algorithms()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown_table())
