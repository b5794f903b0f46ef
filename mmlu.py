"""Score a model on MMLU: accuracy by subject and on average, with 95 % confidence intervals.

Inputs:  --load, a Megatron checkpoint (quantized ones too), or --pretrained-model-path, a Hugging
         Face folder or hub name; --mmlu-dataset, questions from the hub, a folder or a file.
Outputs: a table, and --mmlu-output, the same as JSON with every answer; exit code 1 if the average
         is below --lower-bound.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B_quant TP=2 bash mmlu.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.common import files, manifest, outputs
from post_training.common.errors import UsageError
from post_training.common.report import beside
from post_training.config import arguments
from post_training.evaluation import mmlu_data, mmlu_prompts
from post_training.evaluation import options as mmlu_options
from post_training.models import parallel_check

if TYPE_CHECKING:
    from post_training.distributed.session import Session
    from post_training.evaluation.mmlu import Result

logger = logging.getLogger("post_training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mmlu")
    add = group.add_argument
    mmlu_options.add_arguments(add, dataset="cais/mmlu")
    add("--lower-bound", type=float, help="exit with code 1 if the average accuracy is below")
    add(
        "--mmlu-output",
        metavar="FILE",
        help="JSON report (beside the model: <model>.mmlu.json, or in $MLM_WORK_DIR if that "
        "cannot be written or the model is a hub name)",
    )


def check(args: argparse.Namespace) -> None:
    if args.lower_bound is not None and not 0 <= args.lower_bound <= 1:
        raise UsageError(
            f"--lower-bound {args.lower_bound}", "an accuracy is 0 to 1", "give e.g. 0.68"
        )
    if args.context_parallel_size > 1:
        raise UsageError(
            f"CP={args.context_parallel_size}",
            "scoring computes whole sequences on each rank",
            "leave CP at 1; DP splits the questions",
        )
    source = find_source(args)
    if source.is_local:
        parallel_check.check(source.architecture, arguments.parallel(args))
    mmlu_options.check(args)
    output = report_path(args)
    outputs.writable(output, f"--mmlu-output {output}")


def mmlu(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Load the model, ask the questions, write the report. Returns it, the same on every rank."""
    from tqdm import tqdm

    from post_training.evaluation import mmlu

    benchmark = mmlu_data.load(args.mmlu_dataset, args.few_shots)
    source = fetch_source(find_source(args), args)
    model = loading.load(source, args, session)
    tokenizer = loading.tokenizer(source, args)
    asked = len(mmlu_prompts.select(benchmark.test, args.fraction))
    logger.info(
        "MMLU: %d questions of %d subjects, %d-shot, from %s",
        asked,
        len(benchmark.test),
        args.few_shots,
        args.mmlu_dataset,
    )
    started = time.monotonic()
    with tqdm(total=asked, unit="question", disable=not session.show_progress) as bar:
        result = mmlu.evaluate(
            model,
            tokenizer,
            benchmark,
            few_shots=args.few_shots,
            fraction=args.fraction,
            batch_size=args.mmlu_batch_size,
            progress=lambda done: bar.update(done * session.parallel.data),
        )
    seconds = time.monotonic() - started
    positions = source.architecture.max_position_embeddings
    if result.longest > positions:
        logger.warning(
            "the longest prompt has %d tokens, the model was made for %d: lower --few-shots",
            result.longest,
            positions,
        )
    content = report(args, session, source, result, seconds)
    if session.is_main:
        path = report_path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, content)
    return content


def report(
    args: argparse.Namespace,
    session: Session,
    source: Source,
    result: Result,
    seconds: float,
) -> dict[str, Any]:
    """What goes into the JSON file."""
    scored = result.score.to_json()
    return {
        "stage": "mmlu",
        "command": manifest.command(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "configuration": arguments.explicit(args),
        "inputs": [*source.inputs(), manifest.describe_input("questions", args.mmlu_dataset)],
        "few_shots": args.few_shots,
        "fraction": args.fraction,
        **scored,
        "passed": args.lower_bound is None or scored["accuracy"] >= args.lower_bound,
        "ties": result.ties,
        "answers": result.letters(),
        "seconds": round(seconds, 3),
        "prompt_tokens": result.prompt_tokens,
        "computed_tokens": result.computed_tokens,
        "peak_memory_bytes": session.peak_memory(),
        "parallel": {
            "tensor": session.parallel.tensor,
            "pipeline": session.parallel.pipeline,
            "data": session.parallel.data,
        },
        "versions": manifest.versions(),
        "git_commit": manifest.git_commit(),
    }


def report_path(args: argparse.Namespace) -> Path:
    """Where the report goes: ``--mmlu-output``, or beside the model, or in the work folder."""
    if args.mmlu_output:
        return Path(args.mmlu_output)
    return beside(args.load or args.pretrained_model_path, "mmlu")


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


def main() -> None:
    args = arguments.parse_namespace("mmlu", add_arguments, check)
    from post_training.cli.stage import open_session

    with open_session(args) as session:
        content = mmlu(args, session)
        if session.is_main:
            print_table(content)
            logger.info("report: %s (%.1f s)", report_path(args), content["seconds"])
        is_main = session.is_main
    if args.lower_bound is not None and content["accuracy"] < args.lower_bound:
        if is_main:
            print(
                f"error: MMLU accuracy {content['accuracy']:.4f} is below "
                f"--lower-bound {args.lower_bound:.4f}",
                file=sys.stderr,
            )
        sys.exit(1)


if __name__ == "__main__":
    main()
