"""The table at the end of the quickstart.

    python -m quickstart.progress table WORK_FOLDER     size, bits, score, time and folder of each

Nothing here imports torch.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.common import files, manifest
from quickstart import train


@dataclass(frozen=True)
class Row:
    """One line of the final table."""

    step: str
    folder: Path
    scores: Path | None = None


def rows(work: Path) -> list[Row]:
    """The outputs in the order they were made, with those of ``--all`` if they exist."""
    further = [
        Row("prune", work / "tiny_pruned", work / "mmlu_pruned.json"),
        Row("distill", work / "tiny_distilled", work / "mmlu_distilled.json"),
        Row("eagle3 (with draft)", work / "tiny_eagle3", work / "validate.json"),
        Row("export (draft)", work / "tiny_eagle3_export"),
    ]
    return [
        Row("trained (BF16)", work / "tiny"),
        Row("convert", work / "tiny_mlm", work / "mmlu_bf16.json"),
        Row("quantize (FP8)", work / "tiny_quant", work / "mmlu_fp8.json"),
        Row("export (FP8)", work / "tiny_export"),
        *(row for row in further if row.folder.is_dir()),
    ]


def show(work: Path) -> None:
    """Print the table to stdout."""
    from rich.console import Console
    from rich.table import Table

    from post_training.common import report

    table = Table(title="The main job, from trained to ready", title_justify="left")
    table.caption = (
        "Scores differ by a few percent on another kind of CPU or with OMP_NUM_THREADS set."
    )
    table.caption_justify = "left"
    for column in ("step", "size", "bits/weight", "score (95 % interval)", "time"):
        table.add_column(column)
    table.add_column("folder", no_wrap=True)
    for row in rows(work):
        content = manifest.read(row.folder) or {}
        table.add_row(
            row.step,
            report.number_of_bytes(_weights(row.folder)),
            _bits(content),
            _score(row.scores),
            _time(row.folder, content),
            str(row.folder),
        )
    Console(width=max(80 + len(str(work)), Console().width)).print(table)


def _weights(folder: Path) -> int:
    return sum(
        path.stat().st_size
        for path in files.tree(folder)
        if path.suffix in (".safetensors", ".distcp")
    )


def _time(folder: Path, content: dict[str, Any]) -> str:
    content = content or files.read_json(folder / train.RECORD) or {}
    return f"{content['seconds']:.0f} s" if "seconds" in content else "-"


def _bits(content: dict[str, Any]) -> str:
    metrics = content.get("metrics", {})
    bits = metrics.get("bits_per_weight", metrics.get("coverage", {}).get("bits_per_weight"))
    return f"{bits:.2f}" if bits is not None else "16.00"


def _score(path: Path | None) -> str:
    content = files.read_json(path) if path is not None else None
    if content is None:
        return "-"
    if "acceptance" in content:
        found = content["acceptance"]
        low, high = found["interval_95"]
        return f"acceptance length {found['acceptance_length']:.2f} ({low:.2f} to {high:.2f})"
    low, high = content["interval_95"]
    return f"{100 * content['accuracy']:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("table")
    table.add_argument("work", type=Path)
    args = parser.parse_args()
    show(args.work)


if __name__ == "__main__":
    main()
