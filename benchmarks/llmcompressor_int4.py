"""The peer of INT4 AWQ and GPTQ: llm-compressor's ``oneshot``, from a Hugging Face folder to one.

    python benchmarks/llmcompressor_int4.py MODEL EXPORT gptq --samples 128 --length 512

Same texts, sequences, group (128) and layers (all but ``lm_head``) as ``quantize.py`` takes from
``random_model.py``'s folder. Prints one line of JSON with seconds of each part and peak memory.
Needs llmcompressor, which the project does not: give it an environment of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any


def measure(
    model_folder: Path, export: Path, method: str, samples: int, length: int, batch: int
) -> dict[str, Any]:
    started = time.perf_counter()
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
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
    rows = [ids[start : start + length] for start in range(0, samples * length, length)]
    data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * length] * len(rows)})
    loaded = time.perf_counter()

    scheme: dict[str, Any] = {"targets": ["Linear"], "scheme": "W4A16", "ignore": ["lm_head"]}
    if method == "gptq":
        recipe = [GPTQModifier(**scheme)]
    else:  # AWQ scales the weights, and rounding to nearest follows
        recipe = [AWQModifier(), QuantizationModifier(**scheme)]
    oneshot(
        model=model,
        dataset=data,
        recipe=recipe,
        num_calibration_samples=samples,
        max_seq_length=length,
        batch_size=batch,
        shuffle_calibration_samples=False,
    )
    if device == "cuda":
        torch.cuda.synchronize()
    quantized = time.perf_counter()
    model.save_pretrained(export, save_compressed=True)
    done = time.perf_counter()
    return {
        "method": method,
        "import_s": round(imported - started, 1),
        "load_s": round(loaded - imported, 1),
        "quantize_s": round(quantized - loaded, 1),
        "export_s": round(done - quantized, 1),
        "total_s": round(done - started, 1),
        "tokens": samples * length,
        "device_peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        "host_peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("export", type=Path)
    parser.add_argument("method", choices=("awq", "gptq"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    print(
        json.dumps(
            measure(args.model, args.export, args.method, args.samples, args.length, args.batch)
        )
    )


if __name__ == "__main__":
    main()
