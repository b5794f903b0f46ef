"""Draft training at several lengths: seconds a step, tokens/s and peak memory of this toolkit.

    python benchmarks/eagle3_steps.py --pretrained-model-path MODEL --lengths 2048 8192 16384

The model is loaded once and nothing is saved; otherwise the loop, the loss and the optimizer are
those of eagle3.py. One sequence of random tokens a step. Prints a line of JSON for each length.
eagle3_hf.py is the peer.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from post_training.checkpoints import loading
from post_training.checkpoints.source import fetch_source, find_source
from post_training.config import arguments
from post_training.drafts.eagle3 import draft


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 8192, 16384])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--work", type=Path, required=True)


class RandomTokens:
    """Sequences of random bytes, every token an answer's."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 64

    def batch(self, indices: Sequence[int]) -> dict[str, Any]:
        import torch

        ids = torch.randint(0, 256, (len(indices), self.length))
        return {"input_ids": ids, "loss_mask": torch.ones_like(ids)}


class Unsaved:
    """In place of checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, *_: Any) -> None:
        return None


def measure(model: Any, plan: draft.Draft, length: int, args: Any, session: Any) -> dict[str, Any]:
    import torch

    from post_training.drafts.eagle3 import task as eagle_training
    from post_training.training.options import TrainingOptions
    from post_training.training.trainer import Trainer

    on_gpu = session.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    metrics: dict[str, float] = {}
    # The first run compiles and allocates; the second is what counts.
    for name, steps in (("warmup", args.warmup), ("timed", args.steps)):
        options = TrainingOptions(steps, seq_length=length, eval_iters=0, log_interval=steps)
        trainer = Trainer(
            model,
            eagle_training.task(model, plan),
            options,
            session,
            cast(Any, Unsaved(args.work / name)),
        )
        metrics = trainer.run(RandomTokens(length)).metrics
        del trainer
    peak = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else 0.0
    return {
        "length": length,
        "step_s": round(length / metrics["tokens_per_second"], 3),
        "tokens_per_second": round(metrics["tokens_per_second"]),
        "device_peak_gb": round(peak, 1),
        "loss": round(metrics["loss"], 3),
    }


def main() -> None:
    args = arguments.parse_namespace("eagle3_steps", add_arguments, find_source)
    from post_training.cli.stage import open_session

    with open_session(args) as session:
        import torch

        from post_training.drafts.eagle3 import attach as eagle

        source = fetch_source(find_source(args), args)
        model = loading.load(source, args, session)
        plan = draft.plan(source.architecture)
        eagle.attach(model, plan, args.seed)
        eagle.freeze_target(model)
        for length in args.lengths:
            try:
                print(json.dumps(measure(model, plan, length, args, session)), flush=True)
            except torch.OutOfMemoryError as error:
                first_line = str(error).splitlines()[0]
                print(json.dumps({"length": length, "error": first_line}), flush=True)


if __name__ == "__main__":
    main()
