"""The parts of an evaluation that servers are asked: text, MMLU and GSM8K."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypedDict

from annotated_types import MinLen
from tqdm import tqdm

from post_training.common.errors import UsageError
from post_training.config.server_options import ServerOptions
from post_training.data import text_windows
from post_training.data.text_windows import Window
from post_training.distributed.session import Session
from post_training.evaluation import (
    gsm8k,
    gsm8k_judged,
    mmlu_asked,
    mmlu_data,
    mmlu_measure,
    text_options,
    text_report,
)
from post_training.evaluation.answers import Measure
from post_training.evaluation.evaluate_options import EvaluateOptions
from post_training.evaluation.gsm8k import Problems
from post_training.evaluation.mmlu_data import Benchmark
from post_training.inference.options import SamplingOptions
from post_training.servers import chat, logprobs, multiple_choice
from post_training.servers.client import Client, RefusedError
from post_training.servers.identity import Server
from post_training.servers.logprobs import LogProbabilities
from post_training.servers.ordered import in_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("post_training")


class _Choice(TypedDict):
    text: str


class _Reply(TypedDict):
    choices: Annotated[list[_Choice], MinLen(1)]


def judge_text(
    options: EvaluateOptions,
    judged: Sequence[Server],
    tokenizer: PreTrainedTokenizerBase,
    session: Session,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report's entry for the text, of one server or of two, and the files that were read.

    Raises:
        UsageError: also if a server gives no log probabilities of a prompt's tokens.
    """
    # A server adds a token to each window.
    most = [each.positions - 1 for each in judged if each.positions is not None]
    window, stride = options.text.lengths(min([options.text.text_window, *most]))
    text = text_windows.load(
        str(options.text.text),
        tokenizer,
        text_options.OPTION,
        length=window,
        stride=stride,
        most=options.text.text_tokens,
    )
    logger.info("text: %s", text.describe())
    names = ("loss", "reference_loss")
    sums: dict[str, list[float]] = {}
    total = len(text.windows) * len(judged)
    with tqdm(total=total, unit="window", disable=not session.show_progress) as bar:
        for name, server in zip(names, judged, strict=False):
            asked = _losses(server, options.serving, tokenizer, text.windows, bar.update)
            sums[name] = asyncio.run(asked)
    entry = text_report.of_sums(text, sums)
    return {"window": window, "stride": stride, **entry}, list(text.read)


async def _losses(
    server: Server,
    serving: ServerOptions,
    tokenizer: PreTrainedTokenizerBase,
    windows: Sequence[Window],
    progress: Callable[[int], Any],
) -> list[float]:
    """Cross entropy of each window's scored tokens, in nats, summed."""
    async with Client(server.address, server.model, serving) as client:
        given = LogProbabilities(client, server, {})
        offer = await given.probe(windows[0].tokens)
        if not offer.of_prompt:
            raise logprobs.refuse(server, "--text", offer)
        await multiple_choice.require_tokenizer(given, server, tokenizer, windows[0].tokens)

        async def one(window: Window) -> float:
            found = await given.of_prompt(window.tokens)
            progress(1)
            return -sum(found[len(found) - window.scored :])

        answers = in_order(windows, one, serving.server_concurrency)
        return [each async for each in answers]


def ask_mmlu(
    options: EvaluateOptions,
    benchmark: Benchmark | None,
    server: Server,
    tokenizer: PreTrainedTokenizerBase,
    session: Session,
) -> list[Measure]:
    """Ask MMLU's questions; without a ``benchmark`` those of the hub's data set."""
    asked_for = options.mmlu
    few_shots = asked_for.few_shots
    benchmark = benchmark or mmlu_data.load(str(asked_for.mmlu_dataset), few_shots)
    asked = mmlu_asked.tokenized(tokenizer, benchmark, few_shots, asked_for.fraction)
    total = len(asked.questions)
    logger.info("MMLU: %d questions to %s", total, server)
    with tqdm(total=total, unit="question", disable=not session.show_progress) as bar:
        result = multiple_choice.ask(server, options.serving, tokenizer, asked, bar.update)
    return [mmlu_measure.measure(result, few_shots)]


def ask_gsm8k(
    options: EvaluateOptions, problems: Problems | None, server: Server, session: Session
) -> list[Measure]:
    """Ask GSM8K's problems; without ``problems`` those of the hub's data set."""
    problems = problems or options.gsm8k.problems(hub=True)
    assert problems is not None  # a data set is named
    shots, most = options.gsm8k.gsm8k_shots, options.gsm8k.gsm8k_max_new_tokens
    total = len(problems.test)
    logger.info("GSM8K: %d problems to %s", total, server)
    prompts = [gsm8k.prompt(each, problems.examples) for each in problems.test]
    with tqdm(total=total, unit="problem", disable=not session.show_progress) as bar:
        texts = asyncio.run(_texts(server, options.serving, prompts, most, bar.update))
    return gsm8k_judged.measures(problems.test, texts, shots, most)


async def _texts(
    server: Server,
    serving: ServerOptions,
    prompts: Sequence[str],
    most: int,
    progress: Callable[[int], Any],
) -> list[str]:
    """Greedy continuations, cut where the next question begins."""
    extra = chat.plain_sampling(server, SamplingOptions())
    async with Client(server.address, server.model, serving) as client:

        async def one(prompt: str) -> str:
            try:
                reply: _Reply = await client.complete(
                    _Reply,
                    extra,
                    prompt=prompt,
                    max_tokens=most,
                    temperature=0.0,
                    stop=list(gsm8k.STOPS),
                )
            except RefusedError as error:
                if not error.about_length:
                    raise
                raise UsageError(
                    f"--gsm8k-max-new-tokens {most}", error.said, "lower it, or --gsm8k-shots"
                ) from error
            progress(1)
            return gsm8k.cut(reply["choices"][0]["text"])

        answers = in_order(prompts, one, serving.server_concurrency)
        return [each async for each in answers]
