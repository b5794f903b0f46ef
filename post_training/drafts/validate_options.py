"""The options of validate.py. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from post_training.config import checks
from post_training.config.flags import flag, group
from post_training.config.server_options import ServedOptions, check_address
from post_training.inference import options as prompt_options
from post_training.inference.options import PromptOptions


@dataclass(frozen=True, kw_only=True)
class ValidateOptions(ServedOptions):
    # One request at a time: as decoding here, and where a draft pays.
    DEFAULTS: ClassVar[Mapping[str, Any]] = {
        "prompts_path": prompt_options.MT_BENCH,
        "server_concurrency": 1,
    }

    steps: int = flag(
        1,
        metavar="N",
        check=checks.at_least(1),
        help="draft tokens at a time (%(default)s); a server has its own number",
    )
    osl: int = flag(
        64, metavar="N", check=checks.at_least(1), help="most tokens of an answer (%(default)s)"
    )
    ignore_eos: bool = flag(False, help="decode past the end token, as engines' tests do")
    ground_truth_path: Path | None = flag(
        metavar="FILE", help="compare with what a run saved there"
    )
    save_ground_truth_path: Path | None = flag(
        metavar="FILE", help="save greedy answers for comparisons"
    )
    lower_bound: float | None = flag(help="exit with code 1 if the acceptance length is below")
    require_identical: bool = flag(False, help="exit with code 1 if an answer differs")
    validate_output: Path | None = flag(
        metavar="FILE",
        help="JSON report (beside the model: <model>.validate.json); the figure is FILE.png",
    )
    server_baseline: str | None = flag(
        metavar="URL",
        check=check_address,
        help="with --server: a second one, without the draft, to compare speed and answers with",
    )
    prompts: PromptOptions = group(PromptOptions)
