"""One layer at a time on a GPU of little memory, beside the whole model on all of it.

    python benchmarks/layerwise.py Qwen3-8B --limit-gb 6 --work /tmp/bench
    python benchmarks/layerwise.py Qwen3-14B --limit-gb 10 --formats NVFP4_DEFAULT_CFG --work /tmp/b
    python benchmarks/layerwise.py Qwen3-30B-A3B --layers 8 --limit-gb 6 --work /tmp/bench
    python benchmarks/layerwise.py tiny --samples 8 --length 64 --work /tmp/bench    (on a CPU)

Both quantize the same Hugging Face folder of random weights, calibrate on the same tokens and end
with an exported folder, in processes of their own. For ``--layerwise`` the allocator of PyTorch is
limited to --limit-gb: more is an error. With --batch both calibrate on so many sequences at a time
(by default each as many as its memory takes). The tensors of the two folders are compared byte by
byte. Prints a Markdown table; figures and logs are kept in WORK (results.json, FORMAT-PATH.log).

Disk: the model and two exports, which are removed before the next format.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from quantize_and_export import Figures, StageError, run

ROOT = Path(__file__).resolve().parent.parent
FORMATS = ("FP8_DEFAULT_CFG", "NVFP4_DEFAULT_CFG")
COLUMNS = (
    *("total_s", "ratio", "work_s", "calibration_s", "sequences_at_a_time"),
    *("device_peak_gb", "host_peak_gb", "tensors_that_differ"),
)
WHOLE, LAYERWISE = "whole", "layerwise"
_STAGE = "--stage-limited-to"


def measure(path: str, name: str, args: argparse.Namespace) -> Figures:
    """Run one path for one format."""
    exported, log = args.work / path, args.work / f"{name}-{path}.log"
    for folder in (exported, exported.with_name(f"{exported.name}.incomplete")):
        shutil.rmtree(folder, ignore_errors=True)
    log.unlink(missing_ok=True)
    limit = args.limit_gb if path == LAYERWISE else 0
    words: list[Any] = [
        *("benchmarks/layerwise.py", _STAGE, limit),
        *("--pretrained-model-path", args.work / "model", "--export-dir", exported),
        *("--export-quant-cfg", name, "--skip-generate"),
        *("--calib-dataset-path-or-name", args.work / "model" / "calibration.jsonl"),
        *("--calib-size", args.samples, "--calib-max-sequence-length", args.length),
        *(("--calib-batch-size", args.batch) if args.batch else ()),
        *(("--layerwise",) if path == LAYERWISE else ()),
    ]
    try:
        _, seconds = run(log, *words)
    except StageError as error:
        return {"error": str(error)}
    content = json.loads((exported / "run.json").read_text(encoding="utf-8"))
    peak = content["peak_memory_bytes"]
    return {
        "total_s": round(seconds, 1),
        "work_s": content["seconds"],
        "calibration_s": content["metrics"]["calibration"]["seconds"],
        "sequences_at_a_time": content["metrics"]["calibration"]["sequences_at_a_time"],
        "device_peak_gb": round(peak.get("device", 0) / 1e9, 2),
        "host_peak_gb": round(peak.get("host", 0) / 1e9, 2),
        "versions": content["versions"],
    }


def differences(one: Path, other: Path) -> tuple[int, int]:
    """Tensors of two folders that differ in name, dtype, shape or any byte, and all of them."""
    import torch
    from safetensors import safe_open

    places = [
        {name: file for file in folder.glob("*.safetensors") for name in _names(file)}
        for folder in (one, other)
    ]
    names = places[0].keys() | places[1].keys()
    differ = len(places[0].keys() ^ places[1].keys())
    for name in places[0].keys() & places[1].keys():
        found = []
        for place in places:
            with safe_open(place[name], framework="pt") as file:
                found.append(file.get_tensor(name))
        alike = found[0].dtype == found[1].dtype and found[0].shape == found[1].shape
        as_bytes = [each.reshape(-1).view(torch.uint8) for each in found] if alike else []
        differ += not (alike and torch.equal(*as_bytes))
    return differ, len(names)


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        return list(opened.keys())


def compare(name: str, args: argparse.Namespace) -> dict[str, Figures]:
    """Both paths for one format; prints their rows."""
    found: dict[str, Figures] = {}
    for path in (WHOLE, LAYERWISE):
        if path == WHOLE and args.skip_whole:
            continue
        figures = found[path] = measure(path, name, args)
        whole = found.get(WHOLE, {}).get("total_s")
        if path == LAYERWISE and whole and "total_s" in figures:
            figures["ratio"] = round(figures["total_s"] / whole, 2)
            differ, count = differences(args.work / WHOLE, args.work / LAYERWISE)
            figures["tensors_that_differ"] = f"{differ} of {count}"
        cells = [str(figures.get(column, "")) for column in COLUMNS]
        if "error" in figures:
            cells[0] = "failed"
        print(f"| {name} | {path} | " + " | ".join(cells) + " |", flush=True)
    return found


def stage(limit_gb: float, words: list[str]) -> None:
    """The stage in this process, with ``limit_gb`` of GPU memory at most; 0: all there is."""
    import torch

    if limit_gb and torch.cuda.is_available():
        share = limit_gb * 1e9 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), 0)
    sys.path.insert(0, str(ROOT))
    sys.argv = ["quantize.py", *words]
    import quantize

    quantize.main()


def main() -> None:
    if sys.argv[1:2] == [_STAGE]:
        stage(float(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit-gb", type=float, default=0.0, help="10^9 bytes of GPU memory")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int)
    parser.add_argument("--layers", type=int, help="decoder layers (those of the shape)")
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--skip-whole", action="store_true", help="only one layer at a time")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.work / "model"
    if not model.exists():
        layers = ("--layers", args.layers) if args.layers else ()
        run(args.work / "model.log", "benchmarks/random_model.py", args.shape, model, *layers)
    print(
        "| format | path | total s | ratio | work s | calibration s | sequences at a time | "
        "GPU peak GB | host peak GB | tensors that differ |\n" + "|---|---|" + "---:|" * 8,
        flush=True,
    )
    started, results = time.strftime("%Y-%m-%d %H:%M"), {}
    for name in args.formats:
        results[name] = compare(name, args)
        text = json.dumps({"started": started, "shape": args.shape, "paths": results}, indent=2)
        (args.work / "results.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
