"""generate.py with ``--server``: chat completions of the prompts' conversations, resumable."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from post_training.common import outputs, resumable_jsonl
from post_training.config import checks
from post_training.data.prompts import Dialogue
from post_training.distributed.session import Session
from post_training.inference import generate_options
from post_training.inference import options as prompt_options
from post_training.inference.answered import Answered, totals
from post_training.inference.generate_options import GenerateOptions
from post_training.servers import identity, record
from post_training.servers.chat import Asking
from post_training.servers.client import Client
from post_training.servers.identity import Server
from post_training.servers.ordered import in_order

logger = logging.getLogger("post_training")

# Rows are written when so much is there, or so many seconds after the last were.
_ROWS, _SECONDS = 256, 1.0
_MODEL = "server_model"  # known for certain when the server was asked


@dataclass(frozen=True)
class Plan:
    """``settings`` are everything that the answers depend on: a run is resumed only with them.

    Not the server's address: the same model may be started again elsewhere.
    """

    options: GenerateOptions
    output: Path
    settings: dict[str, Any]
    source: None = None


def check(options: GenerateOptions) -> Plan:
    options.prompts.check_sources()
    output = Path(checks.required("--output", options.output, "OUTPUT_PATH"))
    prompt_options.check_sampling(options.sampling)
    prompt_options.check(options.prompts)
    named = options.serving.server_model
    settings = {_MODEL: named, **generate_options.asked(options)}
    later = () if named else (_MODEL,)
    resumable_jsonl.check(output, settings, overwrite=options.overwrite, later=later)
    return Plan(options, output, settings)


def generate(plan: Plan, session: Session) -> dict[str, Any]:
    """Have the server answer what is not answered yet. Returns the manifest."""
    options = plan.options
    server = identity.find(options.serving.address, options.serving.server_model)
    logger.info("%s, up to %d requests at a time", server, options.serving.server_concurrency)
    settings = {**plan.settings, _MODEL: server.model}
    resumable_jsonl.check(plan.output, settings, overwrite=options.overwrite)
    recorded = generate_options.recorded_prompts(settings)
    read = generate_options.read_prompts(options, recorded)
    logger.info("%s", read.describe())
    outputs.disk_space(plan.output, read.size(options.max_new_tokens))
    rows = resumable_jsonl.Rows(plan.output, settings)
    before = rows.done
    if before:
        logger.info("resuming after %d prompts that are answered already", before)
    tokens = rows.totals.get("generated_tokens", 0)
    started = time.monotonic()
    asking = asyncio.run(_answer_all(plan, server, read.dialogues, rows, session))
    seconds = time.monotonic() - started
    tokens = rows.totals.get("generated_tokens", 0) - tokens
    metrics = {
        "rows": rows.rows,
        **rows.totals,
        "left_out": dict(read.left_out),
        "tokens_per_second": round(tokens / seconds, 2) if tokens else None,
        "sequences_at_a_time": options.serving.server_concurrency,
        "resumed_after_prompts": before,
        "with_reasoning": asking.reasoning,
    }
    if asking.reasoning:
        logger.warning(
            "the server cut reasoning out of %d answers (its reasoning parser); it is kept as "
            "reasoning_content beside them",
            asking.reasoning,
        )
    return rows.finish(record.of_run(options, session, server, inputs=recorded, metrics=metrics))


async def _answer_all(
    plan: Plan,
    server: Server,
    dialogues: Sequence[Dialogue],
    rows: resumable_jsonl.Rows,
    session: Session,
) -> Asking:
    options = plan.options
    questions = [each.questions for each in dialogues]
    bar = tqdm(
        total=sum(questions),
        initial=sum(questions[: rows.done]),
        unit="turn",
        disable=not session.show_progress,
    )
    async with Client(server.address, server.model, options.serving) as client:
        asking = Asking(
            client,
            server,
            options.sampling,
            options.max_new_tokens,
            options.seed,
            options.prompts.template_options,
        )
        answered = in_order(
            dialogues[rows.done :],
            lambda each: asking.answer(each, bar.update),
            options.serving.server_concurrency,
        )
        with contextlib.closing(bar):
            await _write(answered, rows)
    return asking


async def _write(answered: AsyncIterator[Answered], rows: resumable_jsonl.Rows) -> None:
    """Append rows as they come; also those before a failure, or before a signal."""
    waiting: list[Answered] = []
    begun = time.monotonic()
    try:
        async for each in answered:
            waiting.append(each)
            if len(waiting) >= _ROWS or time.monotonic() - begun >= _SECONDS:
                _append(rows, waiting, time.monotonic() - begun)
                waiting, begun = [], time.monotonic()
    except BaseException:
        _append(rows, waiting, time.monotonic() - begun)
        logger.warning("%d rows are kept: the same command resumes after them", rows.rows)
        raise
    _append(rows, waiting, time.monotonic() - begun)


def _append(rows: resumable_jsonl.Rows, answered: Sequence[Answered], seconds: float) -> None:
    if answered:
        lines = [each.row() for each in answered if each.answers]
        rows.append(lines, done=len(answered), totals=totals(answered, seconds))
