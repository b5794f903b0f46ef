"""The flags that say how a model is scored on MMLU. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from post_training.config.batch_size import BatchSize, batch_flag
from post_training.config.checks import at_least, positive_fraction
from post_training.config.flags import flag
from post_training.data import records
from post_training.evaluation import mmlu_data
from post_training.evaluation.mmlu_data import Benchmark


@dataclass(frozen=True, kw_only=True)
class MmluOptions:
    TITLE: ClassVar[str] = "questions"

    mmlu_dataset: str | None = flag(
        metavar="NAME_OR_PATH",
        help="hub name, folder (dev.*, test.*) or file: JSONL, parquet or CSV (%(default)s)",
    )
    fraction: float = flag(
        1.0, check=positive_fraction, help="of each subject's questions, the first (%(default)s)"
    )
    few_shots: int = flag(
        0, check=at_least(0), help="solved examples before each question (%(default)s)"
    )
    mmlu_batch_size: BatchSize = batch_flag("questions at a time")


def load_local(options: MmluOptions) -> Benchmark | None:
    """The questions, where they are on this machine and need no network.

    Raises:
        UsageError: if they cannot be read.
    """
    if not options.mmlu_dataset or not records.is_local(options.mmlu_dataset):
        return None
    return mmlu_data.load(options.mmlu_dataset, options.few_shots)
