"""The calibration flags that stages share: which text, how much of it. Nothing here imports torch.

Both spellings of the data's flag are known, quantize's and prune's of Megatron-LM.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Container
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.common.errors import UsageError
from post_training.config.flags import flag
from post_training.data import document_formats
from post_training.data.sources import TextSource

if TYPE_CHECKING:
    from post_training.data.calibration_data import CalibrationData
    from post_training.models.architecture import Architecture

logger = logging.getLogger("post_training")

OPTION = "--calib-dataset-path-or-name"
_COUNTS = ("calib_size", "calib_max_sequence_length", "calib_batch_size")


def add_arguments(add: Any) -> None:
    """Add the flags with ``add``, the ``add_argument`` of a parser or of its group."""
    add(
        OPTION,
        "--calib-dataset",
        dest="calib_dataset_path_or_name",
        default="cnn_dailymail",
        metavar="PATH_OR_NAME",
        help="JSONL, parquet, CSV or text, a folder of such, or a hub name (%(default)s)",
    )
    add("--calib-size", type=int, default=1024, metavar="N", help="sequences (%(default)s)")
    add(
        "--calib-max-sequence-length",
        type=int,
        default=4096,
        metavar="N",
        help="tokens a sequence (%(default)s)",
    )
    add(
        "--calib-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="sequences a forward pass (%(default)s)",
    )
    add(
        "--calib-use-random-offset",
        action="store_true",
        help="start each document at a random place",
    )


def check(args: argparse.Namespace) -> None:
    """Raise UsageError for counts that are not positive, and for data that cannot be read."""
    for name in _COUNTS:
        positive(args, name)
    document_formats.check(args.calib_dataset_path_or_name, OPTION)


def positive(args: argparse.Namespace, name: str) -> None:
    """Raise UsageError unless the whole number of that name is at least 1."""
    if getattr(args, name) < 1:
        spelled = "--" + name.replace("_", "-")
        raise UsageError(f"{spelled} {getattr(args, name)}", "it is not positive", "1 or more")


def load(args: argparse.Namespace, tokenizer: Any, architecture: Architecture) -> CalibrationData:
    """The packed sequences, the same on every rank; no longer than the model's positions."""
    from post_training.data import calibration_data

    samples = calibration_data.on_first_rank(
        lambda: calibration_data.load_calibration_data(
            args.calib_dataset_path_or_name,
            tokenizer,
            args.calib_size,
            min(args.calib_max_sequence_length, architecture.max_position_embeddings),
            random_offset=args.calib_use_random_offset,
            seed=args.seed,
        )
    )
    logger.info("calibration data: %s", samples.describe())
    return samples


@dataclass(frozen=True, kw_only=True)
class TrainingTextOptions:
    """Flags that name the text or conversations to train on."""

    TITLE: ClassVar[str] = "data"

    finetune_hf_dataset: str | None = flag(
        metavar="NAME_OR_PATH",
        help="what to train on: a data set on the hub, a file or a folder (%(default)s)",
    )
    finetune_data_split: str = flag(
        "train", metavar="NAME", help="of the hub's data set (%(default)s)"
    )
    finetune_data_files: tuple[str, ...] | None = flag(
        metavar="FILE",
        help="files to train on (JSONL, parquet, CSV), or files of the hub's data set",
    )

    def source(self, given: Container[str]) -> TextSource:
        """The source that the flags name; local files replace the default data set.

        Args:
            given: names of the flags that were given.
        """
        files = self.finetune_data_files or ()
        dataset = self.finetune_hf_dataset or ""
        if files and "finetune_hf_dataset" not in given:
            dataset = ""
        return TextSource(dataset, files, self.finetune_data_split)
