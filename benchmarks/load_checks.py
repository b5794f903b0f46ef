"""What the checks of a load cost: hashes compared with ``run.json``, values that are not finite.

    PYTHONPATH=. python benchmarks/load_checks.py --load CHECKPOINT

Loads the checkpoint with and without each check, in turn, each time with its files dropped from the
page cache, and prints the seconds of each as JSON. The first load, which sets things up, is not
counted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from post_training.checkpoints import finite, loading
from post_training.checkpoints.source import Source, find_source
from post_training.cli.stage import Stage, run
from post_training.common import files
from post_training.config.checks import at_least
from post_training.config.flags import flag
from post_training.config.options import StageOptions

if TYPE_CHECKING:
    from post_training.distributed.session import Session


@dataclass(frozen=True, kw_only=True)
class LoadOptions(StageOptions):
    rounds: int = flag(3, check=at_least(1), help="loads of each kind (%(default)s)")


@dataclass(frozen=True)
class Plan:
    options: LoadOptions
    source: Source


def check(options: LoadOptions) -> Plan:
    return Plan(options, find_source(options))


def measure(plan: Plan, session: Session) -> None:
    import torch

    options, source = plan.options, plan.source
    folder = Path(source.location)
    unverified = replace(options, no_verify=True)

    def timed(work: Callable[[], object]) -> float:
        torch.distributed.barrier()
        began = time.perf_counter()
        work()
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        return round(time.perf_counter() - began, 3)

    def load(given: LoadOptions) -> None:
        models.append(loading.load(source, given, session))

    models = [loading.load(source, unverified, session)]
    seconds: dict[str, list[float]] = {"plain": [], "verified": [], "finite": []}
    for _ in range(options.rounds):
        for name, given in (("plain", unverified), ("verified", options)):
            models.clear()
            drop_from_page_cache(folder)
            seconds[name].append(timed(partial(load, given)))
        seconds["finite"].append(timed(lambda: finite.check_model(models[0], "the model")))
    if session.is_main:
        size = files.size_of(folder)
        print(json.dumps({"gigabytes": round(size / 1e9, 2), "seconds": seconds}))


def drop_from_page_cache(folder: Path) -> None:
    for path in files.tree(folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


STAGE = Stage("load_checks", LoadOptions, check, measure)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
