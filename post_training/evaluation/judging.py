"""The parts of an evaluation: what each asks of the models, with its progress bar and log line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from post_training.data import text_windows
from post_training.distributed.collectives import on_first_rank
from post_training.evaluation import (
    gsm8k_judged,
    gsm8k_measure,
    mmlu,
    mmlu_asked,
    mmlu_data,
    mmlu_measure,
    mmlu_prompts,
    text_options,
    text_report,
    text_scores,
)
from post_training.evaluation.answers import Measure
from post_training.evaluation.candidates import Candidate, require_same_tokens
from post_training.evaluation.gsm8k import Problems
from post_training.evaluation.mmlu_data import Benchmark
from post_training.evaluation.options import Gsm8kOptions, MmluOptions
from post_training.evaluation.text_options import TextOptions
from post_training.inference.batching import Batching

logger = logging.getLogger("post_training")


def judge_text(
    options: TextOptions, judged: Sequence[Candidate]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report's entry for the text, of one model or of two, and the files that were read."""
    require_same_tokens(judged)
    session, source = judged[0].session, str(options.text)
    window, stride = options.lengths(min(each.positions for each in judged))
    text = on_first_rank(
        lambda: text_windows.load(
            source,
            judged[0].tokenizer,
            text_options.OPTION,
            length=window,
            stride=stride,
            most=options.text_tokens,
        )
    )
    logger.info("text: %s", text.describe())
    total = len(text.windows)
    with tqdm(total=total, unit="window", disable=not session.show_progress) as bar:
        how: dict[str, Any] = {
            "batch_size": options.text_batch_size,
            "progress": lambda done: bar.update(done * session.parallel.data),
        }
        if options.layerwise:
            one, *other = (each.layered for each in judged)
            scores = text_scores.score_by_layers(one, next(iter(other), None), text.windows, **how)
        else:
            model, *reference = (each.model for each in judged)
            scores = text_scores.score(model, next(iter(reference), None), text.windows, **how)
    entry = text_report.of(text, scores)
    return {"window": window, "stride": stride, **entry}, list(text.read)


def ask_mmlu(
    options: MmluOptions, benchmark: Benchmark | None, candidate: Candidate
) -> list[Measure]:
    """Ask MMLU's questions; without a ``benchmark`` those of the hub's data set."""
    session = candidate.session
    benchmark = benchmark or mmlu_data.load(str(options.mmlu_dataset), options.few_shots)
    count = len(mmlu_prompts.select(benchmark.test, options.fraction))
    logger.info("MMLU: %d questions to the %s", count, candidate.role)
    with tqdm(total=count, unit="question", disable=not session.show_progress) as bar:
        result = mmlu.evaluate(
            candidate.model,
            candidate.tokenizer,
            benchmark,
            few_shots=options.few_shots,
            fraction=options.fraction,
            batching=Batching(options.mmlu_batch_size, "--mmlu-batch-size"),
            progress=lambda done: bar.update(done * session.parallel.data),
        )
    mmlu_asked.warn_if_long(result, candidate.positions)
    return [mmlu_measure.measure(result, options.few_shots)]


def ask_gsm8k(
    options: Gsm8kOptions, problems: Problems | None, candidate: Candidate
) -> list[Measure]:
    """Ask GSM8K's problems; without ``problems`` those of the hub's data set."""
    session = candidate.session
    problems = problems or on_first_rank(lambda: options.problems(hub=True))
    assert problems is not None  # a data set is named
    count = len(problems.test)
    logger.info("GSM8K: %d problems to the %s", count, candidate.role)
    with tqdm(total=count, unit="problem", disable=not session.show_progress) as bar:
        texts = gsm8k_measure.answers(
            candidate.model,
            candidate.tokenizer,
            problems,
            eos_ids=candidate.eos_ids,
            positions=candidate.positions,
            max_new_tokens=options.gsm8k_max_new_tokens,
            batching=Batching(options.gsm8k_batch_size, "--gsm8k-batch-size"),
            progress=lambda done: bar.update(done * session.parallel.data),
        )
    shots, most = options.gsm8k_shots, options.gsm8k_max_new_tokens
    return gsm8k_judged.measures(problems.test, texts, shots, most)
