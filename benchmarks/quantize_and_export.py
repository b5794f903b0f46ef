"""Quantize and export a model of a real one's shape: this toolkit beside ModelOpt's own path.

    python benchmarks/quantize_and_export.py Qwen3-8B --work /tmp/bench

All start from the same Hugging Face folder with random weights, calibrate on the same tokens and
end with a Hugging Face folder: ours in one process and in two (with the checkpoint between them),
ModelOpt's at each of --peer-batches. Each runs in processes of its own, one after the other, on
the same machine. Prints a Markdown table, a row as soon as its path is done, and keeps
WORK/results.json with every figure up to date. What the processes print goes to
WORK/FORMAT-PATH.log, with the seconds since their start. A path that fails is recorded with its
last lines, and the next one runs.

Outputs are removed before the next path: about three times the model's size is needed on disk.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")
OURS, TWO, PEER = "ours", "ours, two processes", "ModelOpt, Hugging Face"
COLUMNS = ("total_s", "device_peak_gb", "host_peak_gb", "size_gb")
ERROR_LINES = 12

Figures = dict[str, Any]


class StageError(Exception):
    """A process failed; the message is the end of what it printed."""


@dataclass
class Benchmark:
    """One model, calibrated on ``samples`` rows of ``length`` tokens, and its results so far."""

    model: Path
    work: Path
    samples: int
    length: int
    peer_batches: list[int]
    two_processes: bool = True
    results: dict[str, dict[str, Figures]] = field(default_factory=dict)

    @property
    def paths(self) -> list[str]:
        ours = [OURS, TWO] if self.two_processes else [OURS]
        return [*ours, *(f"{PEER}, batch {batch}" for batch in self.peer_batches)]

    def measure(self, name: str, path: str) -> Figures:
        """Run one path for one format; adds its figures to the results and saves them."""
        for output in ("quantized", "exported", "peer"):
            for suffix in ("", ".incomplete"):
                shutil.rmtree(self.work / (output + suffix), ignore_errors=True)
        figures: Figures = {}
        try:
            if path.startswith(PEER):
                self._peer(name, figures, int(path.split()[-1]))
            else:
                (self._ours if path == OURS else self._two)(name, figures)
        except StageError as error:
            figures["error"] = str(error)
        self.results.setdefault(name, {})[path] = figures
        text = json.dumps(self.results, indent=2)
        (self.work / "results.json").write_text(text, encoding="utf-8")
        return figures

    def _quantize(self, name: str, log: Path, *outputs: object) -> float:
        """Run the stage in the way of all; the seconds it took."""
        log.unlink(missing_ok=True)
        _, seconds = run(
            log,
            "quantize.py",
            *("--pretrained-model-path", self.model, *outputs),
            *("--export-quant-cfg", name, "--skip-generate"),
            *("--calib-dataset-path-or-name", self.model / "calibration.jsonl"),
            *("--calib-size", self.samples, "--calib-max-sequence-length", self.length),
        )
        return seconds

    def _ours(self, name: str, figures: Figures) -> None:
        exported = self.work / "exported"
        seconds = self._quantize(name, self.work / f"{name}-ours.log", "--export-dir", exported)
        content = _add_manifest(figures, "quantize", exported)
        figures["device_peak_gb"] = _gigabytes(content, "device")
        figures["host_peak_gb"] = _gigabytes(content, "host")
        figures["size_gb"] = _weights_gb(exported)
        figures["total_s"] = round(seconds, 1)

    def _two(self, name: str, figures: Figures) -> None:
        quantized, exported = self.work / "quantized", self.work / "exported"
        log = self.work / f"{name}-two.log"
        quantize_s = self._quantize(name, log, "--save", quantized)
        figures["quantize_stage_s"] = round(quantize_s, 1)
        quantize = _add_manifest(figures, "quantize", quantized)
        _, export_s = run(log, "export.py", "--load", quantized, "--export-dir", exported)
        figures["export_stage_s"] = round(export_s, 1)
        export = _add_manifest(figures, "export", exported)
        figures["device_peak_gb"] = max(_gigabytes(each, "device") for each in (quantize, export))
        figures["host_peak_gb"] = max(_gigabytes(each, "host") for each in (quantize, export))
        figures["size_gb"] = _weights_gb(exported)
        figures["total_s"] = round(quantize_s + export_s, 1)

    def _peer(self, name: str, figures: Figures, batch: int) -> None:
        exported = self.work / "peer"
        log = self.work / f"{name}-peer-{batch}.log"
        log.unlink(missing_ok=True)
        lines, seconds = run(
            log,
            *("benchmarks/modelopt_hf.py", self.model, exported, name),
            *("--samples", self.samples, "--length", self.length, "--batch", batch),
        )
        figures.update(json.loads(next(line for line in reversed(lines) if line.startswith("{"))))
        figures["size_gb"] = _weights_gb(exported)
        figures["total_s"] = round(seconds, 1)


def run(log: Path, script: str, *words: object) -> tuple[list[str], float]:
    """Run a Python script of this repository; ``log`` gets each line and when it came.

    Returns:
        The lines it printed and its wall-clock seconds.

    Raises:
        StageError: if its exit code is not 0.
    """
    started = time.perf_counter()
    lines: list[str] = []
    command = [sys.executable, "-u", script, *map(str, words)]
    with (
        log.open("a", encoding="utf-8") as stream,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            stream.write(f"{time.perf_counter() - started:7.1f}  {line}")
            stream.flush()
    seconds = time.perf_counter() - started
    print(f"{log.stem}: {script} {seconds:.1f} s", file=sys.stderr, flush=True)
    if process.returncode:
        end = "".join(lines[-ERROR_LINES:])
        print(end, file=sys.stderr, flush=True)
        raise StageError(f"{script} ended with code {process.returncode}:\n{end}")
    return lines, seconds


def header() -> str:
    return (
        "| format | path | total s | GPU peak GB | host peak GB | exported GB |\n"
        "|---|---|---:|---:|---:|---:|"
    )


def row(name: str, path: str, figures: Figures) -> str:
    """One path's figures as a line of the table."""
    cells = [str(figures.get(column, "")) for column in COLUMNS]
    if "error" in figures:
        cells[0] = "failed"
    return f"| {name} | {path} | " + " | ".join(cells) + " |"


def ratios(name: str, each: dict[str, Figures]) -> str:
    """Ours divided by the peer's at its fastest batch, where both have the figure."""
    peers = [figures for path, figures in each.items() if path.startswith(PEER)]
    best = min(peers, key=lambda figures: figures.get("total_s", float("inf")), default={})
    pairs = ((each[OURS].get(column), best.get(column)) for column in COLUMNS)
    cells = [f"{ours / peer:.2f}" if ours and peer else "" for ours, peer in pairs]
    return f"| {name} | ours / ModelOpt's fastest | " + " | ".join(cells) + " |"


def _add_manifest(figures: Figures, stage: str, folder: Path) -> Figures:
    """Keep a stage's own seconds and metrics, which the next format's output replaces."""
    content: Figures = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    figures[f"{stage}_seconds_after_imports"] = content["seconds"]
    figures[f"{stage}_metrics"] = content["metrics"]
    figures[f"{stage}_versions"] = content["versions"]
    return content


def _gigabytes(content: Figures, kind: str) -> float:
    return round(content["peak_memory_bytes"].get(kind, 0) / 1e9, 1)


def _weights_gb(folder: Path) -> float:
    return round(sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--one-process", action="store_true", help="not in two processes too")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.work / "model"
    if not model.exists():
        run(args.work / "model.log", "benchmarks/random_model.py", args.shape, model)
    benchmark = Benchmark(
        model, args.work, args.samples, args.length, args.peer_batches, not args.one_process
    )
    print(header(), flush=True)
    for name in args.formats:
        for path in benchmark.paths:
            print(row(name, path, benchmark.measure(name, path)), flush=True)
        print(ratios(name, benchmark.results[name]), flush=True)


if __name__ == "__main__":
    main()
