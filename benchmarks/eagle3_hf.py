"""The peer for draft training: ModelOpt's own Hugging Face EAGLE-3, step by step.

    python benchmarks/eagle3_hf.py MODEL --lengths 2048 8192 16384 --steps 10 --warmup 3

One sequence of random tokens a step, bfloat16, AdamW on the draft alone, as ModelOpt's example
trainer does it (three steps of training-time test). Prints a line of JSON for each length: seconds
a step (median), tokens/s and peak memory, or the error (a length that does not fit is an answer,
too).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any


def draft_configuration(config: Any, attention: str, compiled: bool) -> dict[str, Any]:
    """ModelOpt's EAGLE-3 configuration with the sizes of the target."""
    from copy import deepcopy

    from modelopt.torch.speculative.config import EAGLE3_DEFAULT_CFG

    chosen: dict[str, Any] = deepcopy(EAGLE3_DEFAULT_CFG["config"])
    chosen["eagle_use_torch_compile"] = compiled
    chosen["eagle_architecture_config"] |= {
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "draft_vocab_size": config.vocab_size,
        "_attn_implementation": attention,
    }
    return chosen


def measure(model: Any, length: int, steps: int, warmup: int) -> dict[str, Any]:
    """Train ``steps`` steps after ``warmup`` on sequences of ``length`` tokens."""
    import torch

    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=5e-5)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    times = []
    model.train()
    model._cached_attn_blk_masks.clear()
    for step in range(warmup + steps):
        ids = torch.randint(0, 256, (1, length), device=model.device)
        started = time.perf_counter()
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        if step >= warmup:
            times.append(time.perf_counter() - started)
    seconds = statistics.median(times)
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return {
        "length": length,
        "step_s": round(seconds, 3),
        "tokens_per_second": round(length / seconds),
        "device_peak_gb": round(peak, 1),
        "loss": round(float(loss.detach()), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--attention", choices=["sdpa", "flex_attention"], default="sdpa")
    parser.add_argument("--compile", action="store_true", help="with torch.compile, its default")
    args = parser.parse_args()

    import modelopt.torch.speculative as mtsp
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, device_map=device
    )
    chosen = draft_configuration(model.config, args.attention, args.compile)
    mtsp.convert(model, [("eagle", chosen)])
    for length in args.lengths:
        try:
            print(json.dumps(measure(model, length, args.steps, args.warmup)), flush=True)
        except torch.OutOfMemoryError as error:
            first_line = str(error).splitlines()[0]
            print(json.dumps({"length": length, "error": first_line}), flush=True)


if __name__ == "__main__":
    main()
