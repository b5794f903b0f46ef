"""Score a model on MMLU: accuracy by subject and on average, with 95 % confidence intervals.

Inputs:  --load, a Megatron checkpoint (quantized ones too), or --pretrained-model-path, a Hugging
         Face folder or hub name, or --server, which has the model; --mmlu-dataset, questions from
         the hub, a folder or a file.
Outputs: a table, and --mmlu-output, the same as JSON with every answer; exit code 1 if the average
         is below --lower-bound.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B_quant TP=2 bash mmlu.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from post_training.checkpoints import loading, record
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.cli.stage import Stage, run
from post_training.common import files, manifest, outputs, report
from post_training.config import checks
from post_training.evaluation import mmlu_asked, mmlu_data, mmlu_measure, mmlu_prompts
from post_training.evaluation import options as mmlu_options
from post_training.evaluation.mmlu_data import Benchmark
from post_training.evaluation.mmlu_stage_options import MmluStageOptions
from post_training.models import parallel_check
from post_training.servers import multiple_choice

if TYPE_CHECKING:
    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Plan:
    """``benchmark`` is None until questions of the hub are fetched; ``questions`` records it."""

    options: MmluStageOptions
    source: Source
    report: Path
    benchmark: Benchmark | None
    questions: dict[str, Any]


def check(options: MmluStageOptions) -> Plan:
    checks.no_context_parallelism(options.parallel.context)
    source = find_source(options)
    if source.described:
        parallel_check.check(source.described, options.parallel)
    benchmark = mmlu_options.load_local(options.questions)
    # Here, where they were read: what replaces them later was not asked.
    questions = manifest.describe_input("questions", str(options.questions.mmlu_dataset))
    path = options.mmlu_output or report.beside(source.location, "mmlu")
    outputs.check_file(path, "--mmlu-output", options.stage)
    return Plan(options, source, path, benchmark, questions)


def mmlu(plan: Plan, session: Session) -> dict[str, Any]:
    """Load the model, ask the questions, write the report. Returns it, the same on every rank."""
    from post_training.evaluation import mmlu
    from post_training.inference.batching import Batching

    options, asked = plan.options, plan.options.questions
    dataset = str(asked.mmlu_dataset)
    benchmark = plan.benchmark or mmlu_data.load(dataset, asked.few_shots)
    source = fetch_source(plan.source, options)
    model = loading.load(source, options, session)
    tokenizer = loading.tokenizer(source, options)
    count = len(mmlu_prompts.select(benchmark.test, asked.fraction))
    logger.info(
        "MMLU: %d questions of %d subjects, %d-shot, from %s",
        *(count, len(benchmark.test), asked.few_shots, dataset),
    )
    batching = Batching(asked.mmlu_batch_size, "--mmlu-batch-size")
    started = time.monotonic()
    with tqdm(total=count, unit="question", disable=not session.show_progress) as bar:
        result = mmlu.evaluate(
            model,
            tokenizer,
            benchmark,
            few_shots=asked.few_shots,
            fraction=asked.fraction,
            batching=batching,
            progress=lambda done: bar.update(done * session.parallel.data),
        )
    seconds = time.monotonic() - started
    mmlu_asked.warn_if_long(result, source.architecture.max_position_embeddings)
    content = record.report_of_run(
        options,
        session,
        [*source.inputs(), plan.questions],
        {
            **mmlu_measure.reported(options, result, seconds),
            "questions_at_a_time": batching.largest,
        },
    )
    if session.is_main:
        plan.report.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(plan.report, content)
    return content


def show(plan: Plan | multiple_choice.Plan, content: dict[str, Any], session: Session) -> None:
    print_table(content)
    at_a_time = f"up to {content['questions_at_a_time']} questions at a time"
    logger.info("report: %s (%.1f s, %s)", plan.report, content["seconds"], at_a_time)
    if not content["passed"]:
        print(
            f"error: MMLU accuracy {content['accuracy']:.4f} is below "
            f"--lower-bound {plan.options.lower_bound:.4f}",
            file=sys.stderr,
        )


def print_table(content: dict[str, Any]) -> None:
    """Accuracies by subject and on average, to stdout."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"MMLU, {content['few_shots']}-shot", title_justify="left")
    table.add_column("subject", no_wrap=True)
    for name in ("accuracy", "95 % interval", "correct", "questions"):
        table.add_column(name, justify="right", no_wrap=True)
    for subject, count in content["subjects"].items():
        table.add_row(subject, *_cells(count))
    table.add_section()
    table.add_row("average over questions", *_cells(content), style="bold")
    table.add_row("average over subjects", f"{content['macro_accuracy']:.4f}")
    Console().print(table)


def _cells(count: dict[str, Any]) -> tuple[str, ...]:
    low, high = count["interval_95"]
    return (
        f"{count['accuracy']:.4f}",
        f"{low:.3f} - {high:.3f}",
        str(count["correct"]),
        str(count["total"]),
    )


def exit_code(plan: Plan | multiple_choice.Plan, content: dict[str, Any]) -> int:
    return 0 if content["passed"] else 1


REPORTS = ("mmlu_output",)
SERVED = Stage(
    "mmlu",
    MmluStageOptions,
    multiple_choice.check,
    multiple_choice.mmlu,
    show,
    exit_code,
    REPORTS,
)
STAGE = Stage("mmlu", MmluStageOptions, check, mmlu, show, exit_code, REPORTS, served=SERVED)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
