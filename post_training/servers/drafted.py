"""Measuring a server's draft: questions asked in groups whose counts are known apart."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from post_training.drafts.validate_options import ValidateOptions
from post_training.inference.options import SamplingOptions
from post_training.servers import chat, counters, identity, speed
from post_training.servers.client import Client
from post_training.servers.identity import Server
from post_training.servers.ordered import in_order
from post_training.servers.speed import Question, Timed

logger = logging.getLogger("post_training")

_WARM_UP_TOKENS = 4


@dataclass(frozen=True)
class Measured:
    """Answers in the order of the questions, and how long all of them took together.

    ``apart`` says whether it is known what was accepted of each, and not of several together.
    """

    answers: list[Timed]
    seconds: float
    steps: int = 0
    apart: bool = False

    @property
    def tokens_per_second(self) -> float:
        return sum(each.tokens for each in self.answers) / self.seconds


def extra_fields(server: Server, options: ValidateOptions) -> dict[str, Any]:
    """Fields beside OpenAI's."""
    extra = chat.plain_sampling(server, SamplingOptions())
    if options.prompts.template_options:
        extra["chat_template_kwargs"] = options.prompts.template_options
    if options.ignore_eos:
        extra["ignore_eos"] = True
    return extra


async def plain(
    server: Server, options: ValidateOptions, questions: Sequence[Question]
) -> Measured:
    """The answers of a server without a draft."""
    extra = extra_fields(server, options)
    async with Client(server.address, server.model, options.serving) as client:
        await speed.ask(client, questions[0], extra, _WARM_UP_TOKENS)
        return await _answers(client, questions, extra, options)


async def measure(
    server: Server, options: ValidateOptions, questions: Sequence[Question]
) -> Measured:
    """The answers of a server with a draft, and what each verification accepted.

    Raises:
        UsageError: if the server counts nothing, or has no draft.
    """
    extra = extra_fields(server, options)
    async with Client(server.address, server.model, options.serving) as client:
        if server.engine == identity.SGLANG:
            told = {**extra, counters.DETAILS: True}
            await speed.ask(client, questions[0], told, _WARM_UP_TOKENS)
            found = await _answers(client, questions, told, options)
            for each in found.answers:
                each.accepted = counters.told_accepted(server, each.parts)
            steps = counters.steps_of(server, [each.accepted for each in found.answers])
            return Measured(found.answers, found.seconds, steps, apart=True)
        await counters.settled(server)  # before any answer: there may be no counters
        await speed.ask(client, questions[0], extra, _WARM_UP_TOKENS)
        return await _counted(client, server, questions, extra, options)


async def _counted(
    client: Client,
    server: Server,
    questions: Sequence[Question],
    extra: Mapping[str, Any],
    options: ValidateOptions,
) -> Measured:
    """With counters that are read between groups: single questions, or a category's together."""
    answers: dict[int, Timed] = {}
    seconds, generated = 0.0, 0
    before = await counters.settled(server)
    for group in _groups(questions, options.serving.server_concurrency):
        found = await _answers(client, [questions[i] for i in group], extra, options)
        now = await counters.settled(server)
        added = now.since(before)
        before = now
        seconds += found.seconds
        generated += added.generated
        answers |= zip(group, found.answers, strict=True)
        # Of several answers it is not known whose verification accepted what.
        found.answers[0].accepted = added.accepted()
    in_order_of_questions = [answers[i] for i in range(len(questions))]
    mine = sum(each.tokens for each in in_order_of_questions)
    if generated > 1.01 * mine:
        logger.warning(
            "the server generated %d tokens meanwhile, of which %d are of these answers: it serves "
            "others too, and what their drafts accepted is counted",
            *(generated, mine),
        )
    apart = options.serving.server_concurrency == 1
    return Measured(in_order_of_questions, seconds, len(before.by_position), apart)


def _groups(questions: Sequence[Question], concurrency: int) -> list[list[int]]:
    order = range(len(questions))
    if concurrency == 1:
        return [[i] for i in order]

    def category(i: int) -> str:
        return questions[i].category or ""

    return [list(some) for _, some in groupby(sorted(order, key=category), category)]


async def _answers(
    client: Client,
    questions: Sequence[Question],
    extra: Mapping[str, Any],
    options: ValidateOptions,
) -> Measured:
    begun = time.perf_counter()
    asked = in_order(
        questions,
        lambda each: speed.ask(client, each, extra, options.osl),
        options.serving.server_concurrency,
    )
    answers = [each async for each in asked]
    return Measured(answers, time.perf_counter() - begun)


def speeds(measured: Measured, name: str) -> dict[str, Any]:
    """For a report: ``plain`` or ``speculative`` speed and wait."""
    found = speed.summary(measured.answers, measured.seconds)
    return {
        **({"tokens": found["tokens"]} if name == "speculative" else {}),
        f"{name}_tokens_per_second": found["tokens_per_second"],
        f"{name}_seconds_to_first_token": found["seconds_to_first_token"],
    }


def shown(acceptance: Mapping[str, Any], name: str) -> str:
    """One line for people."""
    rate = acceptance[f"{name}_tokens_per_second"]
    wait = acceptance[f"{name}_seconds_to_first_token"]
    median, p90 = (1000 * wait[each] for each in ("median", "p90"))
    return f"{rate:.1f} tokens/s, first token after {median:.0f} ms (median; {p90:.0f} ms: 90 %)"
