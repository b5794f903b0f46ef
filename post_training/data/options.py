"""The calibration flags that stages share: which text, how much of it. No torch.

Both spellings of the data's flag are known, quantize's and prune's of Megatron-LM.
"""

from __future__ import annotations

import logging
from collections.abc import Container
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from post_training.config.batch_size import BatchSize, batch_flag
from post_training.config.checks import at_least
from post_training.config.flags import flag
from post_training.data import document_formats, provenance
from post_training.data.sources import CALIBRATION, TextSource

if TYPE_CHECKING:
    from post_training.data.calibration_data import CalibrationData
    from post_training.models.architecture import Architecture

logger = logging.getLogger("post_training")


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    TITLE: ClassVar[str] = "calibration"

    calib_dataset_path_or_name: str = flag(
        "cnn_dailymail",
        names=("--calib-dataset",),
        metavar="PATH_OR_NAME",
        help="JSONL, parquet, CSV or text, a folder of such, or a hub name (%(default)s)",
    )
    calib_size: int = flag(1024, metavar="N", check=at_least(1), help="sequences (%(default)s)")
    calib_max_sequence_length: int = flag(
        4096, metavar="N", check=at_least(1), help="tokens per sequence (%(default)s)"
    )
    calib_batch_size: BatchSize = batch_flag("sequences per forward pass")
    calib_use_random_offset: bool = flag(False, help="start each document at a random place")


def check(options: CalibrationOptions) -> None:
    """Raise UsageError for data that cannot be read."""
    document_formats.check(options.calib_dataset_path_or_name, CALIBRATION)


def load(
    options: CalibrationOptions, tokenizer: Any, architecture: Architecture, seed: int
) -> CalibrationData:
    """The packed sequences, the same on every rank; no longer than the model's positions."""
    from post_training.data import calibration_data
    from post_training.distributed import collectives

    place = options.calib_dataset_path_or_name

    def read() -> CalibrationData:
        with provenance.reading("calibration data", [(place, CALIBRATION)]) as files:
            data = calibration_data.load_calibration_data(
                place,
                tokenizer,
                options.calib_size,
                min(options.calib_max_sequence_length, architecture.max_position_embeddings),
                random_offset=options.calib_use_random_offset,
                seed=seed,
            )
        return replace(data, read=tuple(files))

    samples = collectives.on_first_rank(read)
    logger.info("calibration data: %s", samples.describe())
    return samples


@dataclass(frozen=True, kw_only=True)
class TrainingTextOptions:
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
        """The source that the flags name; files replace a data set that is not ``given``."""
        files = self.finetune_data_files or ()
        use_dataset = not files or "finetune_hf_dataset" in given
        dataset = self.finetune_hf_dataset if use_dataset else None
        return TextSource(dataset or "", files, self.finetune_data_split)
