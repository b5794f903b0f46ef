"""Measuring a draft: speculative against plain greedy decoding of the same model, prompt by prompt.

Both decode one sequence at a time in the same run, so that their speeds compare.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from tqdm import tqdm

from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError
from post_training.config.options import StageOptions
from post_training.data.prompts import Prompts
from post_training.distributed.collectives import from_all_ranks
from post_training.distributed.session import Session
from post_training.drafts.acceptance import AnswerPair, TokenizedPrompt, matching
from post_training.drafts.eagle3 import decoding
from post_training.drafts.eagle3.decoding import GreedyChoice
from post_training.drafts.record import draft_of
from post_training.inference import dialogues, forward, generation
from post_training.inference.dialogues import Speaker
from post_training.inference.options import OPTION
from post_training.inference.sampling import greedy

logger = logging.getLogger("post_training")

_WARM_UP_TOKENS = 4


def load_drafted_speaker(
    source: Source, options: StageOptions, session: Session, **answering: Any
) -> Speaker:
    """As ``dialogues.load_speaker``, for a drafted model that can verify.

    Raises:
        UsageError: if its attention is of a kind that cannot verify several tokens at a time.
    """
    speaker = dialogues.load_speaker(source, options, session, **answering)
    if not generation.supports_prefix(speaker.model):
        raise UsageError(
            f"--load {options.load}",
            "its attention has a window, chunks or a state, of which several tokens after a cache "
            "are not verified here",
            "measure the exported draft in an engine",
        )
    draft = draft_of(source)
    if draft is not None and not draft.trained:
        logger.warning("the draft of %s has not been trained yet", options.load)
    return speaker


def first_turns(read: Prompts, speaker: Speaker, steps: int) -> list[TokenizedPrompt]:
    """The first turn of each dialogue, as tokens.

    Those without room for an answer and ``steps`` proposed tokens are left out.

    Raises:
        UsageError: if none is left.
    """
    longest, context = speaker.max_new_tokens, speaker.context_length
    found = []
    for dialogue in read.dialogues:
        first = dialogue.first_turn()
        prompt = speaker.prompt(first, first.messages)
        if len(prompt) + longest + steps <= context:
            found.append(TokenizedPrompt(dialogue.id, prompt, dialogue.category))
    too_long = len(read.dialogues) - len(found)
    if too_long:
        logger.warning("%d prompts leave no room for --osl %d and are left out", too_long, longest)
    if not found:
        raise UsageError(
            f"{OPTION} {read.source}",
            f"no prompt leaves room for {longest} tokens in the model's {context}",
            "lower --osl, or give shorter prompts",
        )
    return found


def answer_all(
    session: Session, speaker: Speaker, questions: Sequence[TokenizedPrompt], steps: int
) -> list[AnswerPair]:
    """Every question's answers, in order, on every rank; replicas share the questions."""
    rank, replicas, _ = generation.data_parallel()
    mine = questions[rank::replicas]
    if mine:
        # The first passes fill caches and compile kernels: they belong to neither time.
        _answer_twice(replace(speaker, max_new_tokens=_WARM_UP_TOKENS), mine[0], steps)
    found = []
    with tqdm(total=len(questions), unit="answer", disable=not session.show_progress) as bar:
        for question in mine:
            found.append(_answer_twice(speaker, question, steps))
            bar.update(replicas)
    # One rank of each replica reports: one that has the logits.
    reports = parallel_state.get_tensor_model_parallel_rank() == 0
    reports &= parallel_state.is_pipeline_last_stage()
    gathered = from_all_ranks((rank, found if reports else None))
    shares = {place: each for place, each in gathered if each is not None}
    return [shares[number % replicas][number // replicas] for number in range(len(questions))]


def _answer_twice(speaker: Speaker, question: TokenizedPrompt, steps: int) -> AnswerPair:
    """The answers to a question; the difference is known on the last pipeline stage only."""
    model, prompt, longest = speaker.model, question.prompt, speaker.max_new_tokens
    ends, size = speaker.eos_ids, len(speaker.tokenizer)
    plainly = partial(generation.generate, model, [prompt], longest, ends, vocab_size=size)
    by_draft = partial(decoding.decode, model, prompt, longest, ends, steps=steps, vocab_size=size)
    begun = _now()
    [plain] = plainly()
    between = _now()
    drafted = by_draft()
    ended = _now()
    difference = None
    if drafted.tokens != plain:
        dtype = forward.dtype_of(forward.unwrap(model))
        difference = _difference(plainly, by_draft, matching(drafted.tokens, plain), dtype)
    times = (between - begun, ended - between)
    return AnswerPair(question, plain, drafted.tokens, drafted.accepted, *times, difference)


def _difference(
    plainly: Callable[..., Any], by_draft: Callable[..., Any], at: int, dtype: torch.dtype
) -> dict[str, Any] | None:
    """The first different token, number ``at``, with what each way of decoding saw there.

    Both are repeated with their choices recorded. ``rounding`` says whether the two best logits
    were so close to each other, in either way, that the order of a sum decides between them: a
    pass over several tokens at once adds in another order than one over a single token.
    """
    seen: list[GreedyChoice] = []
    by_draft(watch=seen)
    chosen: list[GreedyChoice] = []

    def choose(logits: torch.Tensor, _rows: Any, _positions: Any) -> torch.Tensor:
        chosen.append(GreedyChoice.of(logits[0]))
        return greedy(logits)

    plainly(choose=choose)
    if not chosen:
        return None
    if at >= min(len(seen), len(chosen)):
        return {"position": at, "plain": None, "speculative": None, "rounding": False}
    both = (chosen[at], seen[at])
    gap = min(choice.logit - choice.second_logit for choice in both)
    size = max(abs(choice.logit) for choice in both)
    return {
        "position": at,
        "plain": both[0]._asdict(),
        "speculative": both[1]._asdict(),
        "rounding": gap <= max(4 * torch.finfo(dtype).eps, 1e-5) * size,
    }


def _now() -> float:
    """Seconds, when the GPU has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
