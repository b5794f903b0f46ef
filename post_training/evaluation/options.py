"""The flags that say how a model is scored on MMLU and GSM8K. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from post_training.config.batch_size import BatchSize, batch_flag
from post_training.config.checks import at_least, positive_fraction
from post_training.config.flags import flag
from post_training.data import records
from post_training.evaluation import gsm8k, mmlu_data
from post_training.evaluation.gsm8k import Problems
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


@dataclass(frozen=True, kw_only=True)
class Gsm8kOptions:
    TITLE: ClassVar[str] = "word problems"

    gsm8k_dataset: str | None = flag(
        metavar="NAME_OR_PATH",
        help=f"GSM8K's test questions: hub name ({gsm8k.HUB}), folder (test.*) or file",
    )
    gsm8k_shots: int = flag(
        8, metavar="N", check=at_least(0), help="solved problems before each (%(default)s)"
    )
    gsm8k_prompt: str | None = flag(
        metavar="YAML", help="file with the solved problems (lm-evaluation-harness' gsm8k-cot.yaml)"
    )
    gsm8k_limit: int | None = flag(metavar="N", check=at_least(1), help="the first N only (all)")
    gsm8k_max_new_tokens: int = flag(
        256, metavar="N", check=at_least(1), help="of an answer (%(default)s)"
    )
    gsm8k_batch_size: BatchSize = batch_flag("problems at a time")

    def read(self) -> dict[str, str | None]:
        """What a report records, by role: both say what is asked."""
        own = gsm8k.prompt_file(self.gsm8k_prompt, self.gsm8k_shots) if self.gsm8k_dataset else None
        return {
            "problems": self.gsm8k_dataset,
            "solved problems": None if own is None else str(own),
        }

    def problems(self, *, hub: bool) -> Problems | None:
        """What is asked; None where it is of the hub, unless ``hub`` says that it may be used.

        Raises:
            UsageError: if questions or solved problems cannot be read.
        """
        source = self.gsm8k_dataset
        if not source:
            return None
        examples = gsm8k.examples(self.gsm8k_prompt, self.gsm8k_shots)
        if not (hub or records.is_local(source)):
            return None
        return Problems(gsm8k.load(source)[: self.gsm8k_limit], examples)
