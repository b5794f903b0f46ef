"""Search for the best quantization of a model within a budget of size or quality.

Inputs:  --load, a Megatron checkpoint, or --pretrained-model-path, a Hugging Face folder or hub
         name; --max-size or --max-kl, the budget; --target and --gpu, what is to serve it; --text,
         what it is judged by; --calib-dataset-path-or-name, what it is calibrated on.
Outputs: --search-dir, a folder with a manifest of each trial, search.json and a report; a table,
         and the command that makes the recommended export. Exit code 1 if no trial is within the
         budget.

A search that was ended resumes: trials that are valid by their manifests are not repeated.

    HF_MODEL_CKPT=/models/Qwen3-8B bash search.sh Qwen/Qwen3-8B --max-size 6GB --gpu hopper \\
        --text wiki.txt
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import record
from post_training.checkpoints.second_model import find_second
from post_training.checkpoints.source import Source, find_source
from post_training.cli.stage import Stage, run
from post_training.common import files, manifest
from post_training.config import checks
from post_training.data import options as calibration_options
from post_training.evaluation import evaluation_report, text_options
from post_training.models import parallel_check
from post_training.quantization import kernels, model_checks
from post_training.reporting import writing
from post_training.search import folder, report, results
from post_training.search import options as search_options
from post_training.search import space as search_space
from post_training.search.options import SearchOptions
from post_training.search.report import Outcome
from post_training.search.space import Space

if TYPE_CHECKING:
    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Plan:
    """What to search among.

    Attributes:
        models: options that name a model, and the model, by the names of trials' models.
        data: text to calibrate on and to be judged by, as it is now.
    """

    options: SearchOptions
    source: Source
    models: Mapping[str, tuple[SearchOptions, Source]]
    folder: Path
    space: Space
    data: list[dict[str, Any]]


@dataclass(frozen=True)
class Found:
    outcome: Outcome
    content: Mapping[str, Any]


def check(options: SearchOptions) -> Plan:
    place = Path(checks.required("--search-dir", options.search_dir, "SEARCH_DIR"))
    checks.no_context_parallelism(options.parallel.context)
    search_options.check(options)
    text_options.check(options.text)
    calibration_options.check(options.calibration)
    source = find_source(options)
    models = {"": (options, source)}
    models |= {name: find_second(options, name, "--also") for name in options.also}
    for its, each in models.values():
        model_checks.check_state(each, f"--load {its.load}")
        if each.described is not None:
            parallel_check.check(each.described, options.parallel)
            kernels.check_names(options.left_out, each.described)
            evaluation_report.require_same_vocabulary(each, source)
    found = search_space.find(options, [(name, each) for name, (_, each) in models.items()])
    folder.check(place)
    read = {
        "calibration data": options.calibration.calib_dataset_path_or_name,
        "text": str(options.text.text),
    }
    data = [manifest.describe_input(role, name) for role, name in read.items()]
    options = options.noting(found.describe())
    if len({*read.values()}) == 1:
        options = options.noting("the text is what the model is calibrated on: KL is optimistic")
    return Plan(options, source, models, place, found, data)


def search(plan: Plan, session: Session) -> Found:
    """Measure what is not measured yet; write search.json and the report."""
    from post_training.distributed.collectives import on_first_rank
    from post_training.search.running import Runner

    options = plan.options
    on_first_rank(partial(folder.prepare, plan.folder, overwrite=options.overwrite))
    runner = Runner(options, session, plan.folder, dict(plan.models))
    measured = list(runner.results(plan.space.trials))
    for _ in range(options.mixtures.search_rounds):
        measured += runner.results(results.between(options, measured))
    outcome = Outcome.of(measured)
    inputs = [entry for _, source in runner.models.values() for entry in source.inputs()]
    found = report.to_json(options, plan.space, outcome)
    content = record.report_of_run(options, session, [*inputs, *plan.data], found)

    def write() -> None:
        files.write_json(plan.folder / folder.REPORT, content)
        writing.write([plan.folder], plan.folder / folder.PAGE)

    on_first_rank(write)
    return Found(outcome, content)


def show(plan: Plan, found: Found, session: Session) -> None:
    report.show(plan.options, found.content, found.outcome)
    logger.info("report: %s, %s", plan.folder / folder.PAGE, plan.folder / folder.REPORT)
    if not found.content["passed"]:
        print(f"error: {report.missed(plan.options, found.outcome)}", file=sys.stderr)


def exit_code(plan: Plan, found: Found) -> int:
    return 0 if found.content["passed"] else 1


STAGE = Stage("search", SearchOptions, check, search, show, exit_code, outputs=("search_dir",))


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
