"""Run several stages in one set of processes: ``tests/helpers/tools.py`` starts it.

Starting Python with megatron-core and ModelOpt takes many seconds; the stages' own work on tiny
models takes one. The argument is a JSON list of [stage, [flags...]]; all share the parallel sizes
of the first. ``logits`` is one more stage: it loads a model as the others do and writes its logits;
speculative_jobs.py has others.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from post_training.checkpoints import loading
from post_training.config import arguments


def add_logits_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)


def logits(args: argparse.Namespace, session: Any) -> None:
    from safetensors.torch import load_file, save_file

    from post_training.inference import generation

    source = loading.fetch(loading.find(args), args)
    model = loading.load(source, loading.build_options(args, source), session)
    ids = load_file(args.ids)["ids"].to(session.device)
    result = generation.prefill_logits(model, ids)
    if session.is_main:
        save_file({"logits": result.float().cpu().contiguous()}, args.output)


def stage_module(name: str) -> Any:
    if name == "logits":
        return SimpleNamespace(
            add_arguments=add_logits_arguments, check=loading.find, logits=logits
        )
    if name in ("prepare", "decode"):
        return importlib.import_module("speculative_jobs").job(name)
    return importlib.import_module(name)


def main() -> None:
    jobs = json.loads(sys.argv[1])
    first = stage_module(jobs[0][0])
    args = arguments.parse(jobs[0][0], first.add_arguments, lambda args: None, jobs[0][1])
    from post_training.distributed import runtime

    with runtime.session(args) as session:
        for name, flags in jobs:
            module = stage_module(name)
            parsed = arguments.parse(name, module.add_arguments, module.check, flags)
            getattr(module, name)(parsed, session)


if __name__ == "__main__":
    main()
