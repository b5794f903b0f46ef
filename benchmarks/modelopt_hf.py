"""The peer: ModelOpt's own Hugging Face path, load -> mtq.quantize -> export_hf_checkpoint.

    python benchmarks/modelopt_hf.py MODEL EXPORT FP8_DEFAULT_CFG --samples 128 --length 512

Prints one line of JSON with seconds of each part and peak memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any


def measure(
    model_folder: Path, export: Path, name: str, samples: int, length: int, batch: int
) -> dict[str, Any]:
    started = time.perf_counter()
    import modelopt.torch.quantization as mtq
    import torch
    from modelopt.torch.export import export_hf_checkpoint
    from transformers import AutoModelForCausalLM, AutoTokenizer

    imported = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.bfloat16, device_map=device
    )
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    ids: list[int] = []
    with (model_folder / "calibration.jsonl").open(encoding="utf-8") as stream:
        for line in stream:
            ids += [*tokenizer(json.loads(line)["text"]).input_ids, tokenizer.eos_token_id]
    rows = torch.tensor(ids[: samples * length]).reshape(-1, length).to(device)
    loaded = time.perf_counter()

    def calibrate(module: torch.nn.Module) -> None:
        with torch.inference_mode():
            for some in rows.split(batch):
                module(some)

    mtq.quantize(model, getattr(mtq, name), calibrate)
    if device == "cuda":
        torch.cuda.synchronize()
    quantized = time.perf_counter()
    with torch.inference_mode():
        export_hf_checkpoint(model, export_dir=export)
    done = time.perf_counter()
    return {
        "import_s": round(imported - started, 1),
        "load_s": round(loaded - imported, 1),
        "quantize_s": round(quantized - loaded, 1),
        "export_s": round(done - quantized, 1),
        "total_s": round(done - started, 1),
        "tokens": int(rows.numel()),
        "device_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "host_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("name")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1, help="sequences a forward pass")
    args = parser.parse_args()
    sizes = (args.samples, args.length, args.batch)
    print(json.dumps(measure(args.model, args.export, args.name, *sizes)))


if __name__ == "__main__":
    main()
