"""Score a megatron-core model on multiple-choice questions, in one prefill for each.

The answer is the letter with the largest logit after ``Answer:``. The output layer computes only
that position, and returns only the letters' logits. The common prefix of a subject's prompts
(header and solved examples) is computed once for the subject.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from post_training.evaluation import mmlu_asked
from post_training.evaluation.mmlu_asked import Result, shared_length
from post_training.evaluation.mmlu_data import Benchmark
from post_training.evaluation.mmlu_prompts import Question
from post_training.inference import generation
from post_training.inference.batching import Batching, alike

logger = logging.getLogger("post_training")

# A prefix shorter than this saves less than the extra forward pass and the copies cost.
_SHORTEST_PREFIX = 32
# Questions that stay together where several replicas share them: each computes a subject's prefix.
_PART = 128


@dataclass(frozen=True)
class _Part:
    """Questions for one replica; the first ``shared`` tokens are those of all of ``subject``."""

    indices: list[int]
    shared: int = 0
    subject: str = ""


def evaluate(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    *,
    few_shots: int = 0,
    fraction: float = 1.0,
    batching: Batching,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Ask the questions; a collective call over all ranks, with the same result on each.

    Data-parallel ranks share the questions.

    Args:
        model: a GPTModel or HybridModel without sequence and context parallelism.
        tokenizer: the model's; special tokens are added as it does by default.
        few_shots: solved examples before each question.
        fraction: of each subject's questions, the first ones.
        batching: questions at a time.
        progress: called with the number of questions done after each batch of this rank.

    Raises:
        UsageError: if the tokenizer does not write the letters as single different tokens.
    """
    asked = mmlu_asked.tokenized(tokenizer, benchmark, few_shots, fraction)
    questions, sequences, letters = asked.questions, asked.sequences, asked.letters
    rank, size, group = generation.data_parallel()
    share_prefix = generation.supports_prefix(model)
    parts = list(_parts(questions, sequences, size, share_prefix))
    # Prediction and tie of each question; the other ranks' questions stay 0 here.
    device = next(model.parameters()).device
    outcome = torch.zeros(len(questions), 2, dtype=torch.long, device=device)
    computed = torch.zeros(1, dtype=torch.long, device=device)
    choices = torch.tensor([len(each.choices) for each in questions])
    asking = _Asking(model, sequences, letters.ids, choices)
    for part in _of_rank(parts, sequences, rank, size):
        computed += asking.begin(part)
        for some, (found, count) in asking.passes(batching):
            outcome[list(some)] = found
            computed += count
            if progress is not None:
                progress(len(some))
    if size > 1:
        torch.distributed.all_reduce(outcome, group=group)
        torch.distributed.all_reduce(computed, group=group)
    predictions = outcome[:, 0].tolist()
    return asked.result(predictions, ties=int(outcome[:, 1].sum()), computed=int(computed))


@dataclass
class _Asking:
    """Questions on their way through the model, one part after the other.

    Attributes:
        sequences: tokens of every question.
        letters: tokens of the answers.
        choices: number of choices of every question, int64 [n].
    """

    model: torch.nn.Module
    sequences: Sequence[list[int]]
    letters: Sequence[int]
    choices: torch.Tensor
    part: _Part = _Part([])
    prefix: generation.Prefix | None = None

    def begin(self, part: _Part) -> int:
        """Turn to a part; returns the number of tokens that were computed for it."""
        before, self.part = self.part, part
        if not part.shared:
            self.prefix = None
        elif before.subject != part.subject or self.prefix is None:
            self.prefix = None  # its memory is needed
            tokens = self.sequences[part.indices[0]][: part.shared]
            self.prefix = generation.prefill_prefix(self.model, tokens)
            return part.shared
        return 0

    def positions(self, question: int) -> int:
        return len(self.sequences[question])

    def tokens(self, question: int) -> int:
        """Those that are computed."""
        return len(self.sequences[question]) - self.part.shared

    def passes(self, batching: Batching) -> Iterator[tuple[Sequence[int], Any]]:
        """Ask the part's questions: those of each pass, and what :meth:`ask` found."""
        for some in alike([self.model], self.part.indices, self.positions):
            yield from batching.over(
                self.model, some, self.ask, positions=self.positions, tokens=self.tokens
            )

    def ask(self, some: Sequence[int]) -> tuple[torch.Tensor, int]:
        """Answer and tie of some questions, int64 [n, 2], and the positions that were computed."""
        rest = [torch.tensor(self.sequences[i][self.part.shared :]) for i in some]
        padded = pad_sequence(rest, batch_first=True)
        lengths = [len(each) for each in rest]
        logits = generation.last_logits(self.model, padded, lengths, self.letters, self.prefix)
        offered = torch.arange(logits.shape[1]) < self.choices[list(some)].unsqueeze(1)
        logits = logits.masked_fill(~offered.to(logits.device), -torch.inf)
        best = logits.argmax(1, keepdim=True)
        ties = (logits == logits.gather(1, best)).sum(1, keepdim=True) > 1
        return torch.cat([best, ties.long()], 1), padded.numel()


def _parts(
    questions: Sequence[Question],
    sequences: Sequence[list[int]],
    replicas: int,
    share_prefix: bool,
) -> Iterator[_Part]:
    """Questions by subject, longest first, so that running out of memory shows at once."""
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, question in enumerate(questions):
        groups[question.subject].append(index)
    separate: list[int] = []
    size = len(questions) if replicas == 1 else _PART
    for subject, indices in groups.items():
        # One token must be left: the output layer needs a position.
        some = [sequences[i] for i in indices]
        shared = min(shared_length(some), min(map(len, some)) - 1)
        if share_prefix and shared >= _SHORTEST_PREFIX and len(indices) > 1:
            for part in _by_length(indices, sequences, size):
                yield _Part(part, shared, subject)
        else:
            separate += indices
    for part in _by_length(separate, sequences, min(size, -(-len(separate) // replicas) or 1)):
        yield _Part(part)


def _by_length(
    indices: Sequence[int], sequences: Sequence[list[int]], size: int
) -> Iterator[list[int]]:
    ordered = sorted(indices, key=lambda i: len(sequences[i]), reverse=True)
    return map(list, batched(ordered, size))


def _of_rank(
    parts: Sequence[_Part], sequences: Sequence[list[int]], rank: int, size: int
) -> list[_Part]:
    """This rank's share: the largest part goes to whoever has least so far."""

    def tokens(part: _Part) -> int:
        return part.shared + sum(len(sequences[i]) - part.shared for i in part.indices)

    shares: list[list[_Part]] = [[] for _ in range(size)]
    loads = [0] * size
    for part in sorted(parts, key=tokens, reverse=True):
        least = loads.index(min(loads))
        shares[least].append(part)
        loads[least] += tokens(part)
    return sorted(shares[rank], key=lambda part: part.subject)
