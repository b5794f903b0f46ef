"""validate.py with ``--server``: the engine's own counts of accepted tokens, and its speed."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.checkpoints import record
from post_training.common import outputs, report
from post_training.common.errors import UsageError
from post_training.config.server_options import Address
from post_training.data.prompts import Prompts
from post_training.distributed.session import Session
from post_training.drafts import ground_truth
from post_training.drafts import report as draft_report
from post_training.drafts.acceptance import Acceptance
from post_training.drafts.ground_truth import GroundTruth
from post_training.drafts.validate_options import ValidateOptions
from post_training.inference import options as prompt_options
from post_training.inference.options import PromptOptions
from post_training.servers import drafted, identity
from post_training.servers.speed import Question, Timed

logger = logging.getLogger("post_training")

# What a tokenizer's special tokens look like: a saved text has them, a server's not.
_SPECIAL = re.compile(r"(<[^<>\s]{1,40}>)*")


@dataclass(frozen=True)
class Plan:
    """``saved`` is the ground truth to compare with; without ``prompts`` its own are asked."""

    options: ValidateOptions
    report: Path
    saved: GroundTruth | None
    prompts: PromptOptions | None
    source: None = None


def check(options: ValidateOptions) -> Plan:
    bound = options.lower_bound
    if bound is not None and bound < 1:
        raise UsageError(f"--lower-bound {bound}", "1 is no acceptance at all", "give e.g. 2.1")
    if options.save_ground_truth_path:
        raise UsageError(
            f"--save-ground-truth-path {options.save_ground_truth_path} with --server",
            "it keeps tokens, of which a server gives the text",
            "save it without --server, and compare with it: --ground-truth-path",
        )
    saved = ground_truth.read(options.ground_truth_path) if options.ground_truth_path else None
    if options.require_identical and saved is None and options.server_baseline is None:
        raise UsageError(
            "--require-identical with --server",
            "there are no answers to compare with",
            "give --server-baseline, or --ground-truth-path of a run without --server",
        )
    prompts = options.prompts if saved is None or "prompts_path" in options.given else None
    if prompts is not None:
        prompt_options.check(prompts)
    path = options.validate_output or report.beside(
        identity.report_name(options.serving), "validate"
    )
    outputs.check_file(path, "--validate-output", options.stage)
    draft_report.check_figure(path, "--validate-output")
    return Plan(options, path, saved, prompts)


def validate(plan: Plan, session: Session) -> dict[str, Any]:
    """Ask every prompt, also without the draft if there is such a server; write the report."""
    options, saved = plan.options, plan.saved
    server = identity.find(options.serving.address, options.serving.server_model)
    logger.info("%s, up to %d requests at a time", server, options.serving.server_concurrency)
    questions, origin, read_from = _questions(plan)
    measured = asyncio.run(drafted.measure(server, options, questions))
    acceptance = _acceptance(measured.answers, measured.steps)
    acceptance |= drafted.speeds(measured, "speculative")
    found: dict[str, Any] = {}
    if options.server_baseline:
        address = Address.of(options.server_baseline, "--server-baseline")
        baseline = identity.find(address, None, preferred=server.model)
        logger.info("without the draft: %s", baseline)
        plain = asyncio.run(drafted.plain(baseline, options, questions))
        found["baseline"] = baseline.to_json()
        acceptance |= drafted.speeds(plain, "plain")
        acceptance |= _identical(measured.answers, plain.answers)
        ratio = measured.tokens_per_second / plain.tokens_per_second
        acceptance["speed_up"] = round(ratio, 4)
    settings = _settings(plan, questions, origin, measured.steps)
    if saved is not None:
        found["ground_truth"] = _compared(saved, measured.answers, settings)
    found |= {
        "settings": settings,
        "acceptance": acceptance,
        "draft": None,
        "accepted": [
            {"id": each.question.id, "accepted": each.accepted}
            for each in measured.answers
            if measured.apart
        ],
        "server": server.to_json(),
        "concurrency": options.serving.server_concurrency,
    }
    found["passed"] = not shortcomings(options, found)
    content = record.report_of_run(options, session, read_from, found)
    draft_report.write(plan.report, content)
    return content


def _questions(plan: Plan) -> tuple[list[Question], str, list[dict[str, Any]]]:
    """What is asked, what it is called, and the files that were read."""
    if plan.prompts is not None:
        read, read_from = prompt_options.load_recorded(plan.prompts)
        logger.info("%s; the first turn of each is asked", read.describe())
        return _first_turns(read, plan.prompts.template_options), read.source, read_from
    assert plan.saved is not None  # without prompts there is a ground truth
    asked = [
        Question(each.id, {"prompt": each.prompt}, each.category) for each in plan.saved.questions
    ]
    return asked, str(plan.saved.settings.get("prompts")), []


def _first_turns(read: Prompts, template_options: Mapping[str, Any]) -> list[Question]:
    found = []
    for dialogue in read.dialogues:
        body: dict[str, Any] = {"messages": list(dialogue.first_turn().messages)}
        if dialogue.tools:
            body |= {"tools": list(dialogue.tools), "tool_choice": "none"}
        found.append(Question(dialogue.id, body, dialogue.category))
    return found


def _settings(plan: Plan, questions: Sequence[Question], origin: str, steps: int) -> dict[str, Any]:
    options = plan.options
    if plan.prompts is None and plan.saved is not None:
        asked = plan.saved.questions
        return ground_truth.settings(asked, origin, steps, options.osl, options.ignore_eos)
    found = ground_truth.settings([], origin, steps, options.osl, options.ignore_eos)
    texts = json.dumps([[each.id, dict(each.body)] for each in questions])
    return {**found, "prompts_sha256": hashlib.sha256(texts.encode()).hexdigest()}


def _acceptance(answers: Sequence[Timed], steps: int) -> dict[str, Any]:
    """As ``drafts.acceptance.summarize``; nothing is known yet of decoding without the draft."""
    by_category: dict[str, list[list[int]]] = {}
    for each in answers:
        if each.question.category is not None:
            by_category.setdefault(each.question.category, []).append(each.accepted)
    return {
        **Acceptance(steps, [each.accepted for each in answers]).to_json(),
        "categories": {
            name: Acceptance(steps, accepted).to_json()
            for name, accepted in sorted(by_category.items())
        },
        "plain_tokens_per_second": None,
        "speed_up": None,
        "identical_answers": None,
        "differences": [],
    }


def _identical(answers: Sequence[Timed], plain: Sequence[Timed]) -> dict[str, Any]:
    different = [
        mine for mine, other in zip(answers, plain, strict=True) if mine.text != other.text
    ]
    return {
        "identical_answers": len(answers) - len(different),
        "differences": [{"id": each.question.id} for each in different],
    }


def _compared(
    saved: GroundTruth, answers: Sequence[Timed], now: Mapping[str, Any]
) -> dict[str, Any]:
    """Against the answers and the acceptance of a run without ``--server``."""
    by_key = dict(zip(map(ground_truth.key, saved.questions), saved.questions, strict=True))
    texts = {by_key[name].id: text for name, text in saved.texts.items()}
    both = [(texts[each.question.id], each.text) for each in answers if each.question.id in texts]
    names = ("prompts_sha256", "steps", "osl", "ignore_eos", "temperature")
    return {
        "compared_answers": len(both),
        "same_answers": sum(_is_same(was, text) for was, text in both),
        "saved_acceptance_length": saved.acceptance_length,
        "differing_settings": [
            f"{name} differs from the saved ground truth's: {saved.settings.get(name)} there, "
            f"{now.get(name)} here"
            for name in names
            if saved.settings.get(name) != now.get(name)
        ],
    }


def _is_same(saved: str, text: str) -> bool:
    """Whether a saved text is a server's but for special tokens at its end."""
    return saved.startswith(text) and bool(_SPECIAL.fullmatch(saved[len(text) :]))


def shortcomings(options: ValidateOptions, found: Mapping[str, Any]) -> list[str]:
    """In what the draft falls short of what was asked."""
    failed = []
    acceptance, truth = found["acceptance"], found.get("ground_truth")
    length, bound = acceptance["acceptance_length"], options.lower_bound
    if bound is not None and (length or 0) < bound:
        failed.append(f"acceptance length {length} is below {bound}")
    if options.require_identical:
        if differing := len(acceptance["differences"]):
            failed.append(f"{differing} answers differ from those without the draft")
        if truth and truth["same_answers"] < truth["compared_answers"]:
            different = truth["compared_answers"] - truth["same_answers"]
            failed.append(f"{different} answers differ from the saved ones")
    return failed


def show(plan: Plan, content: dict[str, Any], session: Session) -> None:
    draft_report.print_table(content)
    found, truth = content["acceptance"], content.get("ground_truth")
    rows = {"speculative": drafted.shown(found, "speculative")}
    if found["plain_tokens_per_second"] is not None:
        rows["without the draft"] = drafted.shown(found, "plain")
        rows["speed-up"] = f"{found['speed_up']:.2f}"
        rows["output"] = f"{found['identical_answers']} of {found['answers']} answers are the same"
    if truth:
        rows["ground truth"] = (
            f"{truth['same_answers']} of {truth['compared_answers']} answers are the saved ones; "
            f"acceptance length was {truth['saved_acceptance_length']}, is "
            f"{found['acceptance_length']}"
        )
        for note in truth["differing_settings"]:
            logger.warning("%s", note)
    rows["report"] = f"{plan.report}, {draft_report.figure_of(plan.report).name}"
    report.summary("validated", rows)
    draft_report.warn_of_length(found["acceptance_length"])
    for reason in shortcomings(plan.options, content):
        print(f"error: {reason}", file=sys.stderr)
