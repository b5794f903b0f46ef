"""The options of mmlu.py. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from post_training.config import checks
from post_training.config.flags import flag, group
from post_training.config.server_options import ServedOptions
from post_training.evaluation.options import MmluOptions


@dataclass(frozen=True, kw_only=True)
class MmluStageOptions(ServedOptions):
    DEFAULTS: ClassVar[Mapping[str, Any]] = {"mmlu_dataset": "cais/mmlu"}

    lower_bound: float | None = flag(
        check=checks.fraction, help="exit with code 1 if the average accuracy is below"
    )
    mmlu_output: Path | None = flag(
        metavar="FILE",
        help="JSON report (beside the model: <model>.mmlu.json, or in $MLM_WORK_DIR if that "
        "cannot be written or the model is a hub name)",
    )
    questions: MmluOptions = group(MmluOptions)
