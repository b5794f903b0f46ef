"""What a training run shows and keeps of itself, on rank 0.

- ``training/metrics.jsonl``: one JSON object a log line, ``kind`` ``train`` or ``eval``;
- TensorBoard files of the same numbers;
- a progress bar where there is a terminal, log lines where there is none;
- ``training/curves.png`` at the end.

A resumed run cuts the lines that lie after its checkpoint, and writes them again: the file is that
of a run without the interruption, but for times.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from post_training.common import files, regular

logger = logging.getLogger("post_training")

FILE = "metrics.jsonl"
CURVES = "curves.png"
# They describe the machine rather than the model: not drawn, and not equal between two runs.
MACHINE = ("tokens_per_second", "memory_bytes", "seconds")


def read(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``folder``'s metrics file; a last line that was cut short is left out."""
    lines: list[dict[str, Any]] = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        for line in regular.read_text(folder / FILE).splitlines():
            content = json.loads(line)
            lines += [content] if isinstance(content, dict) else []
    return lines


def panels(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The metrics to draw, in groups: the name up to its last underscore and a number."""
    groups: defaultdict[str, set[str]] = defaultdict(set)
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float) and name not in (*MACHINE, "iteration", "samples"):
                head, _, tail = name.rpartition("_")
                groups[head if tail.isdecimal() else name].add(name)
    return {group: sorted(names) for group, names in groups.items()}


class Metrics:
    """Writes the metrics of a run.

    Args:
        folder: ``training/`` of the run.
        iteration: the run resumes after this one, of ``total``; later lines are cut.
        tensorboard: folder of the TensorBoard files.
        title: of the bar and the curves.
    """

    def __init__(
        self,
        folder: Path,
        iteration: int,
        total: int,
        *,
        show_progress: bool = False,
        tensorboard: str | None = None,
        title: str = "training",
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.title = title
        self.lines = [line for line in read(folder) if line["iteration"] <= iteration]
        files.write_text(folder / FILE, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._stream = (folder / FILE).open("a", encoding="utf-8")
        board = tensorboard or str(folder / "tensorboard")
        self._writer = SummaryWriter(board, purge_step=iteration + 1)
        self.bar = tqdm(
            total=total, initial=iteration, desc=title, unit="it", disable=not show_progress
        )

    def log(self, kind: str, iteration: int, samples: int, values: Mapping[str, float]) -> None:
        """Write one line of ``kind`` (``train``, ``eval``)."""
        line = {"kind": kind, "iteration": iteration, "samples": samples, **values}
        self.lines.append(line)
        self._stream.write(json.dumps(line) + "\n")
        self._stream.flush()
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, iteration)
        shown = {name: value for name, value in values.items() if name not in MACHINE}
        text = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if not self.bar.disable and kind == "train":
            self.bar.set_postfix_str(f"loss {values['loss']:.4f}")
            return
        if values.get("tokens_per_second"):
            text += f"  {values['tokens_per_second']:,.0f} tokens/s"
        text = f"{kind} {iteration:,}/{self.bar.total:,}: {text}"
        if self.bar.disable:
            logger.info("%s", text)
        else:
            self.bar.write(f"[{self.title}] {text}")

    def close(self) -> None:
        """End the files and draw the curves."""
        self.bar.close()
        self._stream.close()
        self._writer.close()
        draw(self.lines, self.folder / CURVES, self.title)


def draw(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """A PNG with one panel for each group of metrics."""
    from matplotlib.figure import Figure

    groups = panels(lines)
    if not groups:
        return
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * rows), layout="constrained")
    for place, (group, names) in enumerate(groups.items(), start=1):
        axis = figure.add_subplot(rows, columns, place, title=group, xlabel="iteration")
        for i, name in enumerate(names):
            for kind, style, label in (("train", "-", name), ("eval", "o--", f"{name} (eval)")):
                shown = [line for line in lines if line["kind"] == kind and name in line]
                if shown:
                    numbers = [line["iteration"] for line in shown]
                    values = [line[name] for line in shown]
                    axis.plot(numbers, values, style, color=f"C{i}", label=label, markersize=4)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(title)
    files.write_whole(path, lambda work: figure.savefig(work, format="png", dpi=110))
