"""MMLU's questions as tokens, and what was answered, whoever answers. No torch."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

from post_training.common.errors import UsageError
from post_training.evaluation import mmlu_prompts
from post_training.evaluation.mmlu_data import Benchmark
from post_training.evaluation.mmlu_prompts import LETTERS, Question, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class Result:
    """A score and how it came about.

    Attributes:
        questions: what was asked, in order.
        predictions: index of the chosen answer for each question.
        ties: questions whose two largest logits are equal; the earlier letter was taken.
        prompt_tokens: tokens of all prompts.
        computed_tokens: positions that went through the model, padding included, prefixes once;
            None where a server had it.
        longest: tokens of the longest prompt.
    """

    score: Score
    questions: list[Question]
    predictions: list[int]
    ties: int
    prompt_tokens: int
    computed_tokens: int | None
    longest: int

    def letters(self) -> dict[str, str]:
        """Chosen letters of each subject in a row, such as ``ABDC``, to compare two runs."""
        found: defaultdict[str, str] = defaultdict(str)
        for question, chosen in zip(self.questions, self.predictions, strict=True):
            found[question.subject] += LETTERS[chosen]
        return dict(found)


def warn_if_long(result: Result, positions: int) -> None:
    """Say so where a prompt is longer than what the model was made for."""
    if result.longest > positions:
        logger.warning(
            "the longest prompt has %d tokens, the model was made for %d: lower --few-shots",
            *(result.longest, positions),
        )


@dataclass(frozen=True)
class AnswerTokens:
    """The tokens after ``Answer:``: ``bridge``, then one of ``ids``."""

    bridge: list[int]
    ids: list[int]


def answer_tokens(tokenizer: PreTrainedTokenizerBase, choices: int = 4) -> AnswerTokens:
    """Tokens of " A", " B", ... after ``Answer:``.

    Most tokenizers have one token for blank and letter. Where the blank is a token of its own it
    belongs to the prompt (``bridge``): the letter is what is to be compared.

    Raises:
        UsageError: if the letters are not single, different tokens after the same beginning.
    """
    start = "Answer:"
    before: list[int] = tokenizer.encode(start, add_special_tokens=False)
    after: list[list[int]] = [
        tokenizer.encode(f"{start} {letter}", add_special_tokens=False)
        for letter in LETTERS[:choices]
    ]
    common = shared_length(after)
    ids = [tokens[-1] for tokens in after]
    if (
        after[0][: len(before)] != before
        or any(len(tokens) != common + 1 for tokens in after)
        or len(set(ids)) < choices
    ):
        raise UsageError(
            f"tokenizer {tokenizer.name_or_path}",
            f"it writes {start!r} as {before} and with letters as {after}: the letters are not "
            "single tokens after it",
            "give the model's own tokenizer with --tokenizer-model",
        )
    return AnswerTokens(after[0][len(before) : common], ids)


def shared_length(sequences: Sequence[list[int]]) -> int:
    """Tokens that all ``sequences`` begin with."""
    # In lexicographic order, what the first and the last share, all share.
    pairs = zip(min(sequences, default=[]), max(sequences, default=[]), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


@dataclass(frozen=True)
class Asked:
    """Questions in order, each with the tokens that a letter follows."""

    questions: list[Question]
    sequences: list[list[int]]
    letters: AnswerTokens

    def result(self, predictions: list[int], *, ties: int, computed: int | None) -> Result:
        """What the predictions, indices of choices, are worth."""
        lengths = [len(tokens) for tokens in self.sequences]
        return Result(
            mmlu_prompts.score(self.questions, predictions),
            self.questions,
            predictions,
            ties=ties,
            prompt_tokens=sum(lengths),
            computed_tokens=computed,
            longest=max(lengths),
        )


def tokenized(
    tokenizer: PreTrainedTokenizerBase, benchmark: Benchmark, few_shots: int, fraction: float
) -> Asked:
    """The questions that are asked, as tokens; special ones as the tokenizer adds by default.

    Args:
        few_shots: solved examples before each question.
        fraction: of each subject's questions, the first ones.

    Raises:
        UsageError: if the tokenizer does not write the letters as single different tokens.
    """
    questions = mmlu_prompts.select(benchmark.test, fraction)
    letters = answer_tokens(tokenizer, max(len(q.choices) for q in questions))
    examples = {subject: found[:few_shots] for subject, found in benchmark.dev.items()}
    prompts = [mmlu_prompts.prompt(each, examples.get(each.subject, [])) for each in questions]
    sequences: list[list[int]] = tokenizer(prompts, verbose=False)["input_ids"]
    for ids in sequences:
        # Some tokenizers append an end token; the model has to continue the text.
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
        ids += letters.bridge
    return Asked(questions, sequences, letters)
