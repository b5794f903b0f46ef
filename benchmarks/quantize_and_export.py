"""Quantize and export a model of a real one's shape: this toolkit beside ModelOpt's own path.

    python benchmarks/quantize_and_export.py Qwen3-8B --work /tmp/bench

Both start from the same Hugging Face folder with random weights, calibrate on the same tokens and
end with a Hugging Face folder; each runs in processes of its own, one after the other, on the same
machine. Prints a Markdown table and writes it, with every figure, to WORK/results.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")


def run(*words: object) -> tuple[str, float]:
    """Standard output and wall-clock seconds of a Python script of this repository."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout, time.perf_counter() - started


def ours(model: Path, work: Path, name: str, samples: int, length: int) -> dict[str, Any]:
    quantized, exported = work / "quantized", work / "exported"
    _, quantize_s = run(
        *("quantize.py", "--pretrained-model-path", model, "--save", quantized, "--overwrite"),
        *("--export-quant-cfg", name, "--skip-generate"),
        *("--calib-dataset-path-or-name", model / "calibration.jsonl"),
        *("--calib-size", samples, "--calib-max-sequence-length", length),
    )
    _, export_s = run("export.py", "--load", quantized, "--export-dir", exported, "--overwrite")
    quantize = json.loads((quantized / "run.json").read_text(encoding="utf-8"))
    export = json.loads((exported / "run.json").read_text(encoding="utf-8"))
    return {
        "total_s": round(quantize_s + export_s, 1),
        "quantize_stage_s": round(quantize_s, 1),
        "export_stage_s": round(export_s, 1),
        "device_peak_gb": max(_gigabytes(quantize, "device"), _gigabytes(export, "device")),
        "host_peak_gb": max(_gigabytes(quantize, "host"), _gigabytes(export, "host")),
        "size_gb": round(_weights(exported) / 1e9, 2),
        "quantize_metrics": quantize["metrics"],
        "export_metrics": export["metrics"],
    }


def peer(model: Path, work: Path, name: str, samples: int, length: int) -> dict[str, Any]:
    exported = work / "peer"
    shutil.rmtree(exported, ignore_errors=True)
    output, seconds = run(
        *("benchmarks/modelopt_hf.py", model, exported, name),
        *("--samples", samples, "--length", length),
    )
    parts = json.loads(output.strip().splitlines()[-1])
    return {**parts, "total_s": round(seconds, 1), "size_gb": round(_weights(exported) / 1e9, 2)}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The results as Markdown, with ratios to the peer."""
    lines = [
        "| format | path | total s | GPU peak GB | host peak GB | exported GB |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, each in results.items():
        for path, figures in each.items():
            cells = (
                figures[key] for key in ("total_s", "device_peak_gb", "host_peak_gb", "size_gb")
            )
            lines.append(f"| {name} | {path} | " + " | ".join(map(str, cells)) + " |")
        ratio = each["ours"]["total_s"] / each["ModelOpt, Hugging Face"]["total_s"]
        lines.append(f"| {name} | ratio of time | {ratio:.2f} | | | |")
    return "\n".join(lines)


def _gigabytes(content: dict[str, Any], kind: str) -> float:
    return round(content["peak_memory_bytes"].get(kind, 0) / 1e9, 1)


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    model = args.work / "model"
    if not model.exists():
        run("benchmarks/random_model.py", args.shape, model)
    results = {}
    for name in FORMATS:
        results[name] = {
            "ours": ours(model, args.work, name, args.samples, args.length),
            "ModelOpt, Hugging Face": peer(model, args.work, name, args.samples, args.length),
        }
    (args.work / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
