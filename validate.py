"""Measure a draft by decoding with it: acceptance length, equality with greedy decoding, speed-up.

Acceptance length is the tokens that a forward pass of the target emits, accepted draft tokens and
one of its own, as vLLM counts it: from 1 (the draft is of no use) to --steps + 1.

Inputs:  --load, a checkpoint with a draft (convert.sh --algorithm eagle3, eagle3.sh), or --server,
         an engine with one, whose own counters are read;
         --prompts-path (MT-Bench's first turns), or --ground-truth-path, which has prompts too.
Outputs: a table, --validate-output as JSON and beside it a figure as PNG; with
         --save-ground-truth-path prompts, greedy answers and settings for a later comparison.

    MLM_MODEL_CKPT=/work/Qwen3-0.6B-Eagle3 STEPS=3 bash validate.sh Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import record
from post_training.checkpoints.source import Source, fetch_source, find_source
from post_training.cli.stage import Stage, run
from post_training.common import outputs, report
from post_training.common.errors import UsageError
from post_training.config import checks
from post_training.drafts import ground_truth
from post_training.drafts import report as draft_report
from post_training.drafts.acceptance import summarize
from post_training.drafts.ground_truth import GroundTruth
from post_training.drafts.record import draft_of, require_draft
from post_training.drafts.validate_options import ValidateOptions
from post_training.inference import options as prompt_options
from post_training.inference.options import PromptOptions
from post_training.models import parallel_check
from post_training.servers import validating

if TYPE_CHECKING:
    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Plan:
    """``saved`` is the ground truth to compare with; without ``prompts`` its own are asked."""

    options: ValidateOptions
    source: Source
    report: Path
    saved: GroundTruth | None
    prompts: PromptOptions | None


def check(options: ValidateOptions) -> Plan:
    bound, most = options.lower_bound, options.steps + 1
    if bound is not None and not 1 <= bound <= most:
        raise UsageError(
            f"--lower-bound {bound}",
            f"an acceptance length with --steps {options.steps} is 1 to {most}",
            "give e.g. 2.1 with --steps 3",
        )
    checks.no_context_parallelism(options.parallel.context)
    source = find_source(options)
    require_draft(source, options)
    if source.described:
        parallel_check.check(source.described, options.parallel)
    saved = None
    if options.ground_truth_path:
        saved = ground_truth.read(options.ground_truth_path)
    prompts = options.prompts if saved is None or "prompts_path" in options.given else None
    if prompts is not None:
        prompt_options.check(prompts)
    kept = options.save_ground_truth_path
    if kept:
        ground_truth.check_target(kept, overwrite=options.overwrite)
    path = options.validate_output or report.beside(source.location, "validate")
    outputs.check_file(path, "--validate-output", options.stage)
    draft_report.check_figure(path, "--validate-output")
    return Plan(options, source, path, saved, prompts)


def validate(plan: Plan, session: Session) -> dict[str, Any]:
    """Decode every prompt twice, write the report. Returns it, the same on every rank."""
    from post_training.distributed.collectives import on_first_rank
    from post_training.drafts import measure

    options, saved, prompts = plan.options, plan.saved, plan.prompts
    read = None
    read_from: list[dict[str, Any]] = []
    if prompts is not None:
        # First what needs the hub: a model may take minutes to load.
        read, read_from = on_first_rank(lambda: prompt_options.load_recorded(prompts))
        logger.info("%s; the first turn of each is asked", read.describe())
    source = fetch_source(plan.source, options)
    speaker = measure.load_drafted_speaker(
        source,
        options,
        session,
        max_new_tokens=options.osl,
        ignore_eos=options.ignore_eos,
        template_options=options.prompts.template_options,
    )
    asked, origin = (saved.questions, saved.settings["prompts"]) if saved else ([], "")
    if read is not None:
        asked, origin = measure.first_turns(read, speaker, options.steps), read.source
    pairs = measure.answer_all(session, speaker, asked, options.steps)
    acceptance = summarize(pairs, options.steps)
    draft = draft_of(source)
    settings = ground_truth.settings(asked, origin, options.steps, options.osl, options.ignore_eos)
    found: dict[str, Any] = {
        "settings": settings,
        "acceptance": acceptance,
        "passed": not shortcomings(options, acceptance),
        "draft": draft.to_json() if draft else None,
        "accepted": [{"id": each.question.id, "accepted": each.accepted} for each in pairs],
        "device": str(session.device),
    }
    if saved is not None:
        found["ground_truth"] = ground_truth.compare(saved, pairs, settings)
    content = record.report_of_run(options, session, [*source.inputs(), *read_from], found)
    if session.is_main:
        draft_report.write(plan.report, content)
        if options.save_ground_truth_path:
            ground_truth.write(options.save_ground_truth_path, content, pairs, speaker.decode)
        for each in acceptance["differences"]:
            logger.warning("%s", draft_report.difference_line(each, speaker.decode))
    return content


def shortcomings(options: ValidateOptions, acceptance: Mapping[str, Any]) -> list[str]:
    """In what the draft falls short of what was asked."""
    failed = []
    length = acceptance["acceptance_length"]
    if options.lower_bound is not None and (length or 0) < options.lower_bound:
        failed.append(f"acceptance length {length} is below {options.lower_bound}")
    if options.require_identical and acceptance["identical_answers"] < acceptance["answers"]:
        failed.append(f"{len(acceptance['differences'])} answers differ from greedy decoding")
    return failed


def show(plan: Plan, content: dict[str, Any], session: Session) -> None:
    draft_report.show(plan.report, content)
    for reason in shortcomings(plan.options, content["acceptance"]):
        print(f"error: {reason}", file=sys.stderr)


def exit_code(plan: Plan | validating.Plan, content: dict[str, Any]) -> int:
    return 0 if content["passed"] else 1


REPORTS = ("validate_output", "save_ground_truth_path")
SERVED = Stage(
    "validate",
    ValidateOptions,
    validating.check,
    validating.validate,
    validating.show,
    exit_code,
    REPORTS,
)
STAGE = Stage("validate", ValidateOptions, check, validate, show, exit_code, REPORTS, served=SERVED)


def main() -> None:
    run(STAGE)


if __name__ == "__main__":
    main()
