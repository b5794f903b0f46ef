"""Judge a model by text and by questions, alone or beside a reference: what did a change cost?

Inputs:  --load, a Megatron checkpoint (quantized ones too), or --pretrained-model-path, a Hugging
         Face folder (export.sh's too) or hub name, or --server, which has the model; --reference, a
         second one, usually the one before; --text, --mmlu-dataset, --gsm8k-dataset, --tasks: what
         they are judged by.
Outputs: a table, and --evaluate-output, the same as JSON with every answer; with a reference, the
         questions that one model answers right and the other wrong, as JSONL beside it; exit code 1
         if a bound is broken.

    REFERENCE_CKPT=/work/Qwen3-0.6B_mlm MLM_MODEL_CKPT=/work/Qwen3-0.6B_quant \\
        bash evaluate.sh Qwen/Qwen3-0.6B --text wiki.txt --max-kl 0.02
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import record
from post_training.checkpoints.second_model import find_second
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.cli.stage import Stage, run
from post_training.common import report
from post_training.common.errors import UsageError
from post_training.config import checks
from post_training.evaluation import (
    answers,
    evaluation_report,
    gates,
    harness_options,
    layerwise_check,
    text_options,
)
from post_training.evaluation import options as mmlu_options
from post_training.evaluation.evaluate_options import EvaluateOptions
from post_training.evaluation.gsm8k import Problems
from post_training.evaluation.mmlu_data import Benchmark
from post_training.models import parallel_check
from post_training.servers import evaluating

if TYPE_CHECKING:
    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Plan:
    """``reference`` and ``of_reference``, its options, are None without one; ``benchmark`` and
    ``problems`` until they are fetched from the hub; ``questions`` records them."""

    options: EvaluateOptions
    source: Source
    of_reference: EvaluateOptions | None
    reference: Source | None
    report: Path
    benchmark: Benchmark | None
    problems: Problems | None
    questions: list[dict[str, Any]]


def check(options: EvaluateOptions) -> Plan:
    checks.no_context_parallelism(options.parallel.context)
    text_options.check(options.text)
    harness_options.check(options.harness)
    asked = options.measures
    has_text = options.text.text is not None
    if not (asked or has_text):
        remedy = "give at least one of --text, --mmlu-dataset, --gsm8k-dataset and --tasks"
        raise UsageError("nothing to evaluate", "neither text nor questions are named", remedy)
    gates.check(options.gates, asked, options.reference is not None, has_text)
    source = find_source(options, or_export=True)
    of_reference, reference = None, None
    if options.reference:
        of_reference, reference = find_second(
            options, options.reference, "--reference", or_export=True
        )
    for each in (source, reference):
        if each and options.text.layerwise:
            layerwise_check.check(options.parallel.pipeline, asked, each)
        if each and each.described:
            parallel_check.check(each.described, options.parallel)
    if reference and has_text:
        evaluation_report.require_same_vocabulary(source, reference)
    benchmark = mmlu_options.load_local(options.mmlu)
    problems = options.gsm8k.problems(hub=False)
    # Here, where they were read: what replaces them later was not asked.
    questions = options.recorded()
    path = options.evaluate_output or report.beside(source.location, "evaluate")
    evaluation_report.check_target(path, options.stage)
    return Plan(options, source, of_reference, reference, path, benchmark, problems, questions)


def evaluate(plan: Plan, session: Session) -> dict[str, Any]:
    """Judge the model and its reference, write the report. Returns it, the same on every rank."""
    from post_training.evaluation import candidates, harness, judging
    from post_training.export.exported_weights import open_export

    options = plan.options
    started = time.monotonic()
    named = [("model", plan.source, options)]
    if plan.reference and plan.of_reference:
        named.append(("reference", plan.reference, plan.of_reference))
    judged = [
        candidates.Candidate(
            role, fetch_source(source, its), its, session, open_export, options.weights_only
        )
        for role, source, its in named
    ]
    asks: list[candidates.Ask] = []
    if options.mmlu.mmlu_dataset:
        asks.append(partial(judging.ask_mmlu, options.mmlu, plan.benchmark))
    if options.gsm8k.gsm8k_dataset:
        asks.append(partial(judging.ask_gsm8k, options.gsm8k, plan.problems))
    if options.harness.names:
        asks.append(partial(harness.ask, options.harness, harness.tasks(options.harness)))
    content: dict[str, Any] = {}
    inputs = [entry for each in judged for entry in each.inputs()] + plan.questions
    if options.text.text:
        content["text"], read = judging.judge_text(options.text, judged)
        inputs += read
    mine, *reference = candidates.ask_all(judged, asks) if asks else [[]]
    content["measures"] = answers.compared(mine, reference[0] if reference else None)
    content |= {"notes": {each.role: each.notes for each in judged if each.notes}}
    content["broken_bounds"] = gates.broken(options.gates, content)
    content["passed"] = not content["broken_bounds"]
    content["seconds"] = round(time.monotonic() - started, 3)
    rows = list(answers.flipped(mine, reference[0])) if reference else None
    content = record.report_of_run(options, session, inputs, content)
    return evaluation_report.write(plan.report, content, rows, session)


def show(plan: Plan | evaluating.Plan, content: dict[str, Any], session: Session) -> None:
    evaluation_report.print_table(content)
    logger.info("report: %s (%.1f s)", plan.report, content["seconds"])
    if flipped := content.get("flipped"):
        logger.info("questions that flipped: %s (%d)", flipped["file"], flipped["rows"])
    for reason in content["broken_bounds"]:
        print(f"error: {reason}", file=sys.stderr)


def exit_code(plan: Plan | evaluating.Plan, content: dict[str, Any]) -> int:
    return 1 if content["broken_bounds"] else 0


REPORTS = ("evaluate_output",)
SERVED = Stage(
    "evaluate",
    EvaluateOptions,
    evaluating.check,
    evaluating.evaluate,
    show,
    exit_code,
    REPORTS,
)
STAGE = Stage("evaluate", EvaluateOptions, check, evaluate, show, exit_code, REPORTS, served=SERVED)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
