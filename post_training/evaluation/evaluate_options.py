"""The options of evaluate.py. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.common import manifest
from post_training.config.flags import flag, group
from post_training.config.server_options import ServedOptions
from post_training.evaluation.gates import GateOptions
from post_training.evaluation.harness_options import HarnessOptions
from post_training.evaluation.options import Gsm8kOptions, MmluOptions
from post_training.evaluation.text_options import TextOptions


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions(ServedOptions):
    reference: str | None = flag(
        metavar="DIR",
        help="model to compare with: a Megatron checkpoint, a Hugging Face folder or a hub name; "
        "with --server another server's address, or a report of this stage",
    )
    weights_only: bool = flag(
        False,
        help="leave inputs, keys and values of a quantized checkpoint unrounded, as an "
        "exported folder is read",
    )
    evaluate_output: Path | None = flag(
        metavar="FILE",
        help="JSON report (beside the model: <model>.evaluate.json, or in $MLM_WORK_DIR if that "
        "cannot be written or the model is a hub name)",
    )
    text: TextOptions = group(TextOptions)
    mmlu: MmluOptions = group(MmluOptions)
    gsm8k: Gsm8kOptions = group(Gsm8kOptions)
    harness: HarnessOptions = group(HarnessOptions)
    gates: GateOptions = group(GateOptions)

    @property
    def measures(self) -> list[str]:
        """Names that the measures of accuracy begin with."""
        asked = {"mmlu": self.mmlu.mmlu_dataset, "gsm8k": self.gsm8k.gsm8k_dataset}
        return [*(name for name, dataset in asked.items() if dataset), *self.harness.names]

    def recorded(self) -> list[dict[str, Any]]:
        """The questions as a report records its inputs: as they are now."""
        named = {
            "questions": self.mmlu.mmlu_dataset,
            **self.gsm8k.read(),
            **self.harness.read(),
        }
        return [manifest.describe_input(name, place) for name, place in named.items() if place]
