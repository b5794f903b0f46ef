"""Draft training at several lengths: seconds a step, tokens/s and peak memory of this toolkit.

    python benchmarks/eagle3_steps.py --pretrained-model-path MODEL --lengths 2048 8192 16384

The model is loaded once and nothing is saved; otherwise the loop, the loss and the optimizer are
those of eagle3.py. One sequence of random tokens a step. Prints a line of JSON for each length.
eagle3_hf.py is the peer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.cli.stage import Stage, run
from post_training.config.checks import at_least, required
from post_training.config.flags import flag, group
from post_training.config.options import StageOptions
from post_training.drafts import options as draft_options
from post_training.drafts import registry
from post_training.drafts.eagle3.draft import Draft
from post_training.drafts.options import DraftOptions
from post_training.training import options as training_options
from post_training.training.options import TrainingFlags, TrainingOptions

if TYPE_CHECKING:
    from post_training.distributed.session import Session


@dataclass(frozen=True, kw_only=True)
class StepsOptions(StageOptions):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"train_iters": 10, "eval_iters": 0}

    lengths: tuple[int, ...] = flag((2048, 8192, 16384), help="tokens a sequence")
    steps: int = flag(10, check=at_least(1), help="steps that are measured")
    warmup: int = flag(3, check=at_least(1), help="steps before them")
    work: str | None = flag(metavar="DIR", help="where metrics go")
    draft: DraftOptions = group(DraftOptions)
    training: TrainingFlags = group(TrainingFlags)


@dataclass(frozen=True)
class Plan:
    options: StepsOptions
    source: Source
    training: TrainingOptions
    work: Path


def check(options: StepsOptions) -> Plan:
    training = training_options.decide(options.training, options, min(options.lengths))
    work = Path(required("--work", options.work, "--work"))
    return Plan(options, find_source(options), training, work)


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


def measure(plan: Plan, model: Any, draft: Draft, length: int, session: Session) -> dict[str, Any]:
    import torch

    from post_training.training.trainer import Trainer

    on_gpu = session.device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    metrics: dict[str, float] = {}
    # The first run compiles and allocates; the second is what counts.
    task = registry.find(draft.algorithm).task(model, draft)
    for name, steps in (("warmup", plan.options.warmup), ("timed", plan.options.steps)):
        options = replace(plan.training, train_iters=steps, seq_length=length, log_interval=steps)
        checkpoints: Any = Unsaved(plan.work / name)
        trainer = Trainer(model, task, options, session, checkpoints)
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


def steps(plan: Plan, session: Session) -> None:
    import torch

    source = fetch_source(plan.source, plan.options)
    model = loading.load(source, plan.options, session)
    draft = draft_options.plan(plan.options.draft, plan.options, source.architecture)
    algorithm = registry.find(draft.algorithm)
    algorithm.attach(model, draft, plan.options.seed)
    algorithm.freeze_target(model)
    for length in plan.options.lengths:
        try:
            print(json.dumps(measure(plan, model, draft, length, session)), flush=True)
        except torch.OutOfMemoryError as error:
            first_line = str(error).splitlines()[0]
            print(json.dumps({"length": length, "error": first_line}), flush=True)


STAGE = Stage("eagle3_steps", StepsOptions, check, steps)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
