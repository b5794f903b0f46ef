"""The summary that a stage prints at its end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.common import files


def summary(title: str, rows: Mapping[str, Any], next_step: str | None = None) -> None:
    """Print a two-column table to stderr, and the command that comes next."""
    from rich.console import Console
    from rich.table import Table

    console = Console(stderr=True)
    table = Table(title=title, title_justify="left", show_header=False, title_style="bold")
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    console.print(table)
    if next_step:
        console.print(f"next: {next_step}", style="dim", soft_wrap=True, highlight=False)


def beside(model: str | Path, stage: str) -> Path:
    """Where a stage reports about a model: ``<model>.<stage>.json`` beside it.

    In the work folder (``MLM_WORK_DIR``) if the model is a hub name or its folder is read-only.
    """
    folder = Path(model).resolve()
    if folder.exists() and os.access(folder.parent, os.W_OK):
        return folder.with_name(f"{folder.name}.{stage}.json")
    default = f"{tempfile.gettempdir()}/megatron_workspace"
    work = Path(os.environ.get("MLM_WORK_DIR") or default)
    return work / f"{str(model).strip('/').replace('/', '--')}.{stage}.json"


def number_of_bytes(count: float) -> str:
    """``1.5 GB``; units of 1000, as disks and model hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def ranges(numbers: Sequence[int], most: int | None = None) -> str:
    """``1-3, 5``; of more than ``most`` ranges the first ones and how many numbers the rest has."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1][1:] = [number]
        else:
            found.append([number])
    left = sum(each[-1] - each[0] + 1 for each in found[most:]) if most is not None else 0
    text = ", ".join("-".join(map(str, each)) for each in found[:most])
    return f"{text} and {left} more" if left else text


def size(folder: Path) -> str:
    """Size of everything below ``folder``."""
    return number_of_bytes(files.size_of(folder))


def cost(content: Mapping[str, Any]) -> dict[str, str]:
    """Rows for time and memory, from a manifest."""
    peaks = content["peak_memory_bytes"].items()
    return {
        "time": f"{content['seconds']:.1f} s",
        "peak memory": ", ".join(f"{number_of_bytes(value)} {name}" for name, value in peaks),
    }
