"""Run several stages in one set of processes: ``tests/helpers/tools.py`` starts it.

Starting Python with megatron-core and ModelOpt takes many seconds; the stages' own work on tiny
models takes one. The argument is a JSON list of [stage, [flags...]]; all share the parallel sizes
of the first. ``logits`` is one more stage: it loads a model as the others do, writes its logits and
the tokens that it generates; speculative_jobs.py has others.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.cli.stage import Stage, make_plan, open_session
from post_training.config import arguments
from post_training.config.flags import flag
from post_training.config.options import StageOptions


@dataclass(frozen=True, kw_only=True)
class LogitsOptions(StageOptions):
    ids: Path = flag(help="token ids")
    output: Path = flag(help="where the logits go")
    new_tokens: int = flag(0, help="greedy tokens to generate, with the KV cache")


@dataclass(frozen=True)
class LogitsPlan:
    options: LogitsOptions
    source: Source


def logits(plan: LogitsPlan, session: Any) -> None:
    from safetensors.torch import load_file, save_file
    from torch import tensor
    from whole_logits import prefill_logits

    from post_training.inference import generation

    source = fetch_source(plan.source, plan.options)
    model = loading.load(source, plan.options, session)
    ids = load_file(plan.options.ids)["ids"].to(session.device)
    result = prefill_logits(model, ids)
    found = {"logits": result.float().cpu().contiguous()}
    if count := plan.options.new_tokens:
        new = generation.generate(model, ids.tolist(), max_new_tokens=count)
        found["tokens"] = tensor(new)
    if session.is_main:
        save_file(found, plan.options.output)


LOGITS = Stage(
    "logits", LogitsOptions, lambda options: LogitsPlan(options, find_source(options)), logits
)


def stage_of(name: str) -> Any:
    if name == "logits":
        return LOGITS
    if name in ("prepare", "decode"):
        return importlib.import_module("speculative_jobs").JOBS[name]
    return importlib.import_module(name).STAGE


def main() -> None:
    jobs = json.loads(sys.argv[1])
    first = stage_of(jobs[0][0])
    with open_session(arguments.parse(first.name, first.options, jobs[0][1])) as session:
        for name, flags in jobs:
            stage = stage_of(name)
            plan = make_plan(stage, flags)
            result = stage.work(plan, session)
            if session.is_main and stage.show is not None:
                stage.show(plan, result, session)


if __name__ == "__main__":
    main()
