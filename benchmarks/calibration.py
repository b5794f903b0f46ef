"""Calibration alone: tokens a second at several batch sizes, this toolkit beside ModelOpt's path.

    python benchmarks/calibration.py MODEL --work /tmp/calibration --batches 1 4 16 64 auto

MODEL is a folder of ``random_model.py``. Both sides load it once, calibrate FP8_DEFAULT_CFG at each
batch size and tell the seconds of the forward passes, the peak of GPU memory, and how many scales
differ from those of batch 1. The matrix rate is that of a bfloat16 product of 8192 x 8192 in the
same process. Prints a Markdown table and keeps WORK/calibration.json. ``--profile`` writes what
ours spends its time on at the last size to WORK/profile.txt.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FORMAT = "FP8_DEFAULT_CFG"
SIDES = ("ours", "peer")


def matrix_rate() -> float:
    """FLOP/s of a large bfloat16 product on this device."""
    import torch

    on_gpu = torch.cuda.is_available()
    size, repeats = (8192, 20) if on_gpu else (1024, 3)
    device = "cuda" if on_gpu else "cpu"
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    for _ in range(2):
        a @ b
    seconds, _ = timed(lambda: [a @ b for _ in range(repeats)])
    return 2 * size**3 * repeats / seconds


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds, and gigabytes that were allocated on the GPU at most."""
    import torch

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0


def forget(model: Any) -> None:
    """Let the next calibration start anew."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    for module in model.modules():
        if isinstance(module, TensorQuantizer) and module.is_enabled:
            module.reset_amax()
            if module._calibrator is not None:
                module._calibrator.reset()


def scales(model: Any) -> dict[str, Any]:
    from modelopt.torch.quantization.nn import TensorQuantizer

    return {
        name: module.amax.float().cpu()
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.amax is not None
    }


def differences(found: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """How many scales are not those of the first size, and the largest relative difference."""
    relative = [float(((found[n] - first[n]) / first[n]).abs().max()) for n in first]
    return {"differ": sum(each > 0 for each in relative), "of": len(first), "by": max(relative)}


def series(
    model: Any, batches: list[str], calibrate: Callable[[str], Any], tokens: int, parameters: int
) -> dict[str, Any]:
    """Figures by batch size; a size that memory does not take is recorded as such."""
    import torch

    calibrate(batches[0])  # kernels are chosen, extensions compiled
    rate = matrix_rate()
    found: dict[str, Any] = {"matrix_tflops": round(rate / 1e12, 1)}
    first: dict[str, Any] = {}
    for batch in batches:
        forget(model)
        chosen: list[Any] = []
        try:
            seconds, peak = timed(lambda b=batch, c=chosen: c.append(calibrate(b)))  # type: ignore[misc]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            found[batch] = {"error": "out of memory"}
            continue
        now = scales(model)
        first = first or now
        found[batch] = {
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds),
            "of_matrix_rate": round(2 * parameters * tokens / seconds / rate, 3),
            "device_peak_gb": round(peak, 1),
            "chosen": chosen[0],
            "scales": differences(now, first),
        }
        print(batch, found[batch], file=sys.stderr, flush=True)
    return found


def ours(args: argparse.Namespace) -> dict[str, Any]:
    from post_training.checkpoints import loading
    from post_training.checkpoints.source import find_source
    from post_training.cli.stage import open_session
    from post_training.config import arguments
    from post_training.data import options as calibration_options
    from post_training.quantization.formats import registry as formats
    from post_training.quantization.options import QuantizeOptions

    words = ["--pretrained-model-path", str(args.model), "--bf16"]
    words += ["--calib-dataset-path-or-name", str(args.model / "calibration.jsonl")]
    words += ["--calib-size", str(args.samples), "--calib-max-sequence-length", str(args.length)]
    options = arguments.parse("quantize", QuantizeOptions, words)
    with open_session(options) as session:
        import modelopt.torch.quantization as mtq

        from post_training.config.batch_size import number_or_auto
        from post_training.inference.batching import Batching
        from post_training.quantization import ptq
        from post_training.quantization.calibration import Calibration

        source = find_source(options)
        tokenizer = loading.tokenizer(source, options)
        samples = calibration_options.load(
            options.calibration, tokenizer, source.architecture, options.seed
        )
        model = loading.load(source, options, session)

        def data(batch: str) -> Calibration:
            return Calibration(samples, Batching(number_or_auto(batch), "--calib-batch-size"))

        ptq.with_format(model, options, formats.FORMATS[FORMAT], data("1"))

        def calibrate(batch: str) -> int:
            one = data(batch)
            one.only_maxima = True
            mtq.calibrate(model, "max", forward_loop=one)
            return one.batching.largest

        parameters = sum(p.numel() for p in model.decoder.parameters())
        found = series(model, args.batches, calibrate, samples.tokens, parameters)
        if args.profile:
            profile(lambda: calibrate(args.batches[-1]), args.work / "profile.txt")
        return found


def profile(work: Callable[[], Any], path: Path) -> None:
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as recording

    with recording(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
    tables = [found.key_averages().table(sort_by=key, row_limit=25)
              for key in ("self_cuda_time_total", "self_cpu_time_total")]  # fmt: skip
    path.write_text("\n".join(tables), encoding="utf-8")


def peer(args: argparse.Namespace) -> dict[str, Any]:
    import modelopt.torch.quantization as mtq
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, device_map=device
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids: list[int] = []
    with (args.model / "calibration.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            ids += [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]
    rows = torch.tensor(ids[: args.samples * args.length]).reshape(-1, args.length).to(device)

    def loop(batch: int) -> Callable[[Any], None]:
        def run(module: Any) -> None:
            with torch.inference_mode():
                for some in rows.split(batch):
                    # The decoder alone: calibration needs no logits.
                    (module.model if args.no_head else module)(some, use_cache=False)

        return run

    mtq.quantize(model, getattr(mtq, FORMAT), loop(1))

    def calibrate(batch: str) -> int:
        mtq.calibrate(model, "max", forward_loop=loop(int(batch)))
        return int(batch)

    parameters = sum(p.numel() for p in model.model.layers.parameters())
    sizes = [batch for batch in args.batches if batch != "auto"]
    return series(model, sizes, calibrate, rows.numel(), parameters)


def row(side: str, batch: str, figures: dict[str, Any]) -> str:
    if "error" in figures:
        return f"| {side} | {batch} | {figures['error']} | | | |"
    scale = figures["scales"]
    return (
        f"| {side} | {batch} ({figures['chosen']}) | {figures['tokens_per_second']:,} | "
        f"{100 * figures['of_matrix_rate']:.0f} % | {figures['device_peak_gb']} | "
        f"{scale['differ']} of {scale['of']}, by {scale['by']:.1e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batches", nargs="+", default=["1", "4", "16", "64", "auto"])
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-head", action="store_true", help="the peer computes no logits either")
    parser.add_argument("--side", choices=SIDES, help="(one of the two, in this process)")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.side:
        found = {"ours": ours, "peer": peer}[args.side](args)
        (args.work / f"{args.side}.json").write_text(json.dumps(found), encoding="utf-8")
        return
    print("| path | batch | tokens/s | of matrix rate | GPU peak GB | scales unlike batch 1's |")
    print("|---|---|---:|---:|---:|---|", flush=True)
    results: dict[str, Any] = {}
    for side in SIDES:
        command = [sys.executable, "-m", "benchmarks.calibration", *sys.argv[1:], "--side", side]
        subprocess.run(command, cwd=ROOT, check=False)
        path = args.work / f"{side}.json"
        results[side] = json.loads(path.read_text()) if path.exists() else {"error": "failed"}
        for batch in args.batches:
            if isinstance(results[side].get(batch), dict):
                print(row(side, batch, results[side][batch]), flush=True)
        print(f"{side}: matrix rate {results[side].get('matrix_tflops')} TFLOP/s", flush=True)
        (args.work / "calibration.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
