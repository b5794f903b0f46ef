"""GSM8K's problems answered by generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from post_training.common.errors import UsageError
from post_training.distributed import collectives
from post_training.evaluation import gsm8k, stopping
from post_training.evaluation.gsm8k import Problems
from post_training.inference import generation
from post_training.inference.batching import Batching


def answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Problems,
    *,
    eos_ids: Sequence[int],
    positions: int,
    max_new_tokens: int = 256,
    batching: Batching,
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """The model's greedy answer to each problem, cut where the next question begins.

    A collective call over all ranks, with the same result on each. Data-parallel ranks share the
    problems round-robin.

    Args:
        model: a GPTModel or HybridModel without sequence and context parallelism.
        tokenizer: the model's; special tokens are added as it does by default.
        eos_ids: tokens that end an answer.
        positions: most tokens of prompt and answer together.
        batching: problems at a time.
        progress: called with the number of problems done after each batch of this rank.

    Raises:
        UsageError: if a prompt leaves no room for an answer.
    """
    texts = [gsm8k.prompt(each, problems.examples) for each in problems.test]
    prompts: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]
    for ids in prompts:
        # Some tokenizers append an end token; the model has to continue the text.
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids.pop()
    longest = max(map(len, prompts))
    if longest + max_new_tokens > positions:
        raise UsageError(
            f"--gsm8k-max-new-tokens {max_new_tokens}",
            f"the longest prompt has {longest:,} tokens, and the model was made for {positions:,}",
            "lower it, or --gsm8k-shots",
        )
    rank, size, group = generation.data_parallel()
    new = generation.generate(
        model,
        prompts[rank::size],
        max_new_tokens,
        eos_ids,
        batching=batching,
        ended=stopping.after(tokenizer, gsm8k.STOPS),
        progress=progress,
    )
    mine = [gsm8k.cut(str(tokenizer.decode(each, skip_special_tokens=True))) for each in new]
    found = [""] * len(prompts)
    for number, part in enumerate(collectives.from_all_ranks(mine, group)):
        found[number::size] = part
    return found
