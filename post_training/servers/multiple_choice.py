"""mmlu.py with ``--server``: the letter with the largest log probability after each question."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from post_training.checkpoints import record
from post_training.common import files, manifest, outputs, report
from post_training.common.errors import UsageError
from post_training.config.server_options import ServerOptions
from post_training.distributed.session import Session
from post_training.evaluation import mmlu_asked, mmlu_data, mmlu_measure
from post_training.evaluation import options as mmlu_options
from post_training.evaluation.mmlu_asked import Asked, Result
from post_training.evaluation.mmlu_data import Benchmark
from post_training.evaluation.mmlu_stage_options import MmluStageOptions
from post_training.servers import identity, logprobs, tokens
from post_training.servers.client import Client
from post_training.servers.identity import Server
from post_training.servers.logprobs import LogProbabilities
from post_training.servers.ordered import in_order

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Plan:
    """``benchmark`` is None until questions of the hub are fetched; ``questions`` records it."""

    options: MmluStageOptions
    tokenizer: str
    report: Path
    benchmark: Benchmark | None
    questions: dict[str, Any]
    source: None = None


def check(options: MmluStageOptions) -> Plan:
    tokenizer = tokens.check(options)
    benchmark = mmlu_options.load_local(options.questions)
    questions = manifest.describe_input("questions", str(options.questions.mmlu_dataset))
    path = options.mmlu_output or report.beside(identity.report_name(options.serving), "mmlu")
    outputs.check_file(path, "--mmlu-output", options.stage)
    return Plan(options, tokenizer, path, benchmark, questions)


def mmlu(plan: Plan, session: Session) -> dict[str, Any]:
    """Ask the questions, write the report. Returns it."""
    options, questions = plan.options, plan.options.questions
    server = identity.find(options.serving.address, options.serving.server_model)
    few_shots = questions.few_shots
    benchmark = plan.benchmark or mmlu_data.load(str(questions.mmlu_dataset), few_shots)
    tokenizer = tokens.load(plan.tokenizer, options)
    asked = mmlu_asked.tokenized(tokenizer, benchmark, few_shots, questions.fraction)
    logger.info("MMLU: %d questions, %d-shot, to %s", len(asked.questions), few_shots, server)
    started = time.monotonic()
    with tqdm(total=len(asked.questions), disable=not session.show_progress) as bar:
        result = ask(server, options.serving, tokenizer, asked, bar.update)
    seconds = time.monotonic() - started
    content = record.report_of_run(
        options,
        session,
        [plan.questions],
        {
            **mmlu_measure.reported(options, result, seconds),
            "questions_at_a_time": options.serving.server_concurrency,
            "server": server.to_json(),
        },
    )
    plan.report.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(plan.report, content)
    return content


def ask(
    server: Server,
    serving: ServerOptions,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    progress: Callable[[int], Any],
) -> Result:
    """Ask a server the questions.

    Raises:
        UsageError: also if it gives no log probabilities, or has another tokenizer.
    """
    result = asyncio.run(_ask_all(server, serving, tokenizer, asked, progress))
    mmlu_asked.warn_if_long(result, server.positions or result.longest)
    return result


async def _ask_all(
    server: Server,
    serving: ServerOptions,
    tokenizer: PreTrainedTokenizerBase,
    asked: Asked,
    progress: Callable[[int], Any],
) -> Result:
    letters = asked.letters.ids
    async with Client(server.address, server.model, serving) as client:
        given = LogProbabilities(client, server, spellings(tokenizer, letters))
        offer = await given.probe(asked.sequences[0])
        if not offer.next_tokens and not offer.of_prompt:
            raise logprobs.refuse(server, "MMLU", offer)
        await require_tokenizer(given, server, tokenizer, asked.sequences[0])

        async def one(number: int) -> tuple[int, bool]:
            choices = letters[: len(asked.questions[number].choices)]
            found = await _scores(given, asked.sequences[number], choices)
            if not any(each is not None for each in found):
                raise logprobs.refuse(server, f"MMLU's question {number + 1}", offer)
            progress(1)
            scores = [-float("inf") if each is None else each for each in found]
            return scores.index(max(scores)), scores.count(max(scores)) > 1

        answers = in_order(range(len(asked.questions)), one, serving.server_concurrency)
        found = [each async for each in answers]
    chosen, ties = [each for each, _ in found], [tied for _, tied in found]
    return asked.result(chosen, ties=sum(ties), computed=None)


async def _scores(
    given: LogProbabilities, prompt: Sequence[int], choices: Sequence[int]
) -> list[float | None]:
    """Of each choice; None where the server only says that it is less probable than another.

    Where none is among the most probable tokens, each is asked for by itself.
    """
    offer = given.offer
    if offer.next_tokens:
        found = await given.next_of(prompt, choices)
        if any(each is not None for each in found) or not offer.of_prompt:
            return found
    return [(await given.of_prompt([*prompt, each]))[-1] for each in choices]


def spellings(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> dict[int, list[str]]:
    """How servers may write a token that they do not number: as text, or as the vocabulary does.

    A spelling that another of the vocabulary's tokens has too is left out.
    """
    found = {}
    for token in ids:
        name = str(tokenizer.convert_ids_to_tokens(token))
        text = str(tokenizer.decode([token]))
        other = tokenizer.convert_tokens_to_ids(text)
        clear = other in (token, None, tokenizer.unk_token_id)
        found[token] = [text, name] if clear else [name]
    return found


async def require_tokenizer(
    given: LogProbabilities,
    server: Server,
    tokenizer: PreTrainedTokenizerBase,
    sequence: Sequence[int],
) -> None:
    """Raise UsageError unless server and tokenizer make as many tokens of the same text."""
    text = str(tokenizer.decode(list(sequence), skip_special_tokens=True))
    mine = len(tokenizer(text, verbose=False)["input_ids"])
    theirs = await given.prompt_size(text)
    if theirs is not None and theirs != mine:
        raise UsageError(
            f"tokenizer {tokenizer.name_or_path}",
            f"it makes {mine} tokens of a text of which the server makes {theirs}: the server's "
            "model has another",
            "name the model's own in TOKENIZER_MODEL (--tokenizer-model)",
        )
