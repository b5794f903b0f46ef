"""evaluate.py with ``--server``: the deployed model, and perhaps another server's, by the same
text, questions and judgement as a model that is loaded."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import record
from post_training.common import report
from post_training.common.errors import UsageError
from post_training.config.server_options import Address, check_address, is_address
from post_training.distributed.session import Session
from post_training.evaluation import (
    answers,
    evaluation_report,
    gates,
    recorded_reference,
    text_options,
)
from post_training.evaluation import options as mmlu_options
from post_training.evaluation.answers import Measure
from post_training.evaluation.evaluate_options import EvaluateOptions
from post_training.evaluation.gsm8k import Problems
from post_training.evaluation.mmlu_data import Benchmark
from post_training.servers import asking, identity, tokens
from post_training.servers.identity import Server

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Plan:
    """``benchmark`` and ``problems`` are None until they are fetched from the hub; ``questions``
    records them. ``tokenizer`` is None where nothing is asked as tokens, ``recorded`` where no
    report is the reference."""

    options: EvaluateOptions
    tokenizer: str | None
    report: Path
    benchmark: Benchmark | None
    problems: Problems | None
    questions: list[dict[str, Any]]
    recorded: dict[str, Any] | None = None
    source: None = None


def check(options: EvaluateOptions) -> Plan:
    text_options.check(options.text)
    _refuse(options)
    asked, has_text = options.measures, options.text.text is not None
    if not (asked or has_text):
        remedy = "give at least one of --text, --mmlu-dataset and --gsm8k-dataset"
        raise UsageError("nothing to evaluate", "neither text nor questions are named", remedy)
    gates.check(options.gates, asked, options.reference is not None, has_text)
    as_tokens = has_text or options.mmlu.mmlu_dataset is not None
    tokenizer = tokens.check(options) if as_tokens else None
    benchmark = mmlu_options.load_local(options.mmlu)
    problems = options.gsm8k.problems(hub=False)
    questions = options.recorded()
    name = identity.report_name(options.serving)
    path = options.evaluate_output or report.beside(name, "evaluate")
    evaluation_report.check_target(path, options.stage)
    recorded = None
    if options.reference and recorded_reference.is_report(options.reference):
        recorded = recorded_reference.read(options.reference, questions)
        questions.append(recorded_reference.entry(options.reference))
    return Plan(options, tokenizer, path, benchmark, problems, questions, recorded)


def _refuse(options: EvaluateOptions) -> None:
    """Raise UsageError for what needs a model that is loaded here."""
    if options.harness.names:
        raise UsageError(
            f"--tasks {options.harness.tasks} with --server",
            "lm-evaluation-harness asks servers through a model of its own",
            "lm_eval --model local-completions, or leave out --server",
        )
    if options.weights_only:
        raise UsageError(
            "--weights-only with --server", "the server computes as it does", "leave it out"
        )
    if options.gates.max_kl is not None:
        raise UsageError(
            f"--max-kl {options.gates.max_kl} with --server",
            "a divergence takes the probabilities of all tokens, which no server gives",
            "compare the export that it serves: evaluate.sh without --server",
        )
    if options.reference is None or recorded_reference.is_report(options.reference):
        return
    if not is_address(options.reference):
        raise UsageError(
            f"--reference {options.reference} with --server",
            "it is no server's address and no report of evaluate.sh, and no model is loaded where "
            "a server is asked",
            "evaluate it without --server and give the report, or serve it and give its address",
        )
    check_address("--reference", options.reference)


def evaluate(plan: Plan, session: Session) -> dict[str, Any]:
    """Judge the server's model and its reference, write the report. Returns it."""
    options = plan.options
    started = time.monotonic()
    judged = [identity.find(options.serving.address, options.serving.server_model)]
    if options.reference and plan.recorded is None:
        address = Address.of(options.reference, "--reference")
        judged.append(identity.find(address, None, preferred=judged[0].model))
    for server in judged:
        logger.info("%s, up to %d requests at a time", server, options.serving.server_concurrency)
    tokenizer = tokens.load(plan.tokenizer, options) if plan.tokenizer else None
    content: dict[str, Any] = {}
    inputs = list(plan.questions)
    if options.text.text and tokenizer is not None:
        content["text"], read = asking.judge_text(options, judged, tokenizer, session)
        inputs += read
        if plan.recorded is not None:
            recorded_reference.add_text(content["text"], read, plan.recorded)
    asked = [_measures(plan, each, tokenizer, session) for each in judged]
    mine, reference = asked[0], asked[1:]
    if plan.recorded is not None:
        reference = [recorded_reference.measures(plan.recorded, mine, str(options.reference))]
    content["measures"] = answers.compared(mine, reference[0] if reference else None)
    content["broken_bounds"] = gates.broken(options.gates, content)
    content["passed"] = not content["broken_bounds"]
    content["seconds"] = round(time.monotonic() - started, 3)
    roles = ("server", "reference_server")
    content |= {role: each.to_json() for role, each in zip(roles, judged, strict=False)}
    rows = list(answers.flipped(mine, reference[0])) if reference else None
    content = record.report_of_run(options, session, inputs, content)
    return evaluation_report.write(plan.report, content, rows, session)


def _measures(
    plan: Plan, server: Server, tokenizer: PreTrainedTokenizerBase | None, session: Session
) -> list[Measure]:
    options = plan.options
    found: list[Measure] = []
    if options.mmlu.mmlu_dataset and tokenizer is not None:
        found += asking.ask_mmlu(options, plan.benchmark, server, tokenizer, session)
    if options.gsm8k.gsm8k_dataset:
        found += asking.ask_gsm8k(options, plan.problems, server, session)
    return found
