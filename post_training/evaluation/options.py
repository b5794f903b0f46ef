"""The flags that say how a model is scored on MMLU. Nothing here imports torch."""

from __future__ import annotations

import argparse
from typing import Any

from post_training.common.errors import UsageError
from post_training.data import records
from post_training.evaluation import mmlu_data


def add_arguments(add: Any, dataset: str | None, when_absent: str = "") -> None:
    """Add the flags with ``add``, the ``add_argument`` of a parser or of its group.

    Args:
        dataset: default of --mmlu-dataset.
        when_absent: what the stage does without it, for the help.
    """
    add(
        "--mmlu-dataset",
        default=dataset,
        metavar="NAME_OR_PATH",
        help="hub name, folder (dev.*, test.*) or file: JSONL, parquet or CSV "
        f"({dataset or when_absent})",
    )
    add("--fraction", type=float, default=1.0, help="of each subject's questions, the first (1.0)")
    add("--few-shots", type=int, default=0, help="solved examples before each question (0)")
    add("--mmlu-batch-size", type=int, default=1, help="questions at a time (1)")


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for a value that cannot be, or local questions that cannot be read."""
    if not 0 < args.fraction <= 1:
        raise UsageError(f"--fraction {args.fraction}", "it is no share", "give 0 < x <= 1")
    if args.few_shots < 0:
        raise UsageError(f"--few-shots {args.few_shots}", "it is negative", "give 0 or more")
    if args.mmlu_batch_size < 1:
        raise UsageError(
            f"--mmlu-batch-size {args.mmlu_batch_size}", "it is not positive", "give 1 or more"
        )
    if args.mmlu_dataset and records.is_local(args.mmlu_dataset):
        mmlu_data.load(args.mmlu_dataset, args.few_shots)
