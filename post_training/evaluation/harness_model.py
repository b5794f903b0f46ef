"""A megatron-core model behind lm-evaluation-harness' model interface, at any parallel layout.

Importing this registers it there as ``post_training``. Every rank runs the harness with the same
requests, so that all ranks of a replica compute together; replicas share a call's requests. Texts
are encoded, and cut where they are too long, as the harness' own transformers model does it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import batched
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from post_training.distributed import collectives
from post_training.evaluation import gsm8k, harness_options, stopping
from post_training.evaluation.candidates import Candidate
from post_training.inference import forward, generation
from post_training.inference.batching import Batching, alike
from post_training.inference.sampling import Sampler

NAME = "post_training"
_MAX_NEW_TOKENS = 256  # of a task that does not say; the harness' default
# Texts, tokens before and tokens to score; the harness gives no texts for parts of documents.
_Request = tuple[Any, list[int], list[int]]


@register_model(NAME)
class MegatronLM(TemplateLM):
    """The model of a candidate; every method is a collective call.

    Args:
        batch_size: most sequences at a time.
        seed: of tasks that sample.
        progress: called with what kind of requests are worked on, and how many are done.
    """

    def __init__(
        self,
        candidate: Candidate,
        batch_size: int = 8,
        seed: int = 0,
        progress: Callable[[str, int], None] = lambda kind, done: None,
    ) -> None:
        super().__init__()
        self.candidate, self.batch_size, self.seed = candidate, batch_size, seed
        self.tokenizer: Any = candidate.tokenizer
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def max_length(self) -> int:
        return self.candidate.positions

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        asked = {"add_generation_prompt": True} if add_generation_prompt else {}
        more = asked or {"continue_final_message": True}
        text = self.tokenizer.apply_chat_template(chat_history, tokenize=False, **more)
        return str(text)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if add_special_tokens is None:
            first = self.tokenizer.decode(self.prefix_token_id)
            more = {"add_special_tokens": False} if string.startswith(first) else {}
        else:
            more = {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **more))

    def _loglikelihood_tokens(
        self, requests: Sequence[_Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log probability of each request's second part, and whether it is the greedy one."""
        # Choices of one token after the same text need one pass: the last token is not an input.
        groups: dict[tuple[int, ...], list[int]] = {}
        for number, (_, before, scored) in enumerate(requests):
            harness_options.require_room(self.max_length, len(scored))
            whole = (before + scored)[-(self.max_length + 1) :]
            groups.setdefault(tuple(whole[:-1]), []).append(number)
        order = sorted(groups, key=len, reverse=True)
        rank, size, group = generation.data_parallel()
        mine: dict[int, tuple[float, bool]] = {}
        runs = alike([self.candidate.model], order, len)
        batches = [each for some in runs for each in batched(some, self.batch_size)]
        for batch in batches[rank::size]:
            members = [(row, n) for row, tokens in enumerate(batch) for n in groups[tokens]]
            scored_parts = [requests[n][2] for _, n in members]
            rows = [row for row, _ in members]
            for (_, number), found in zip(
                members, self._scores(batch, rows, scored_parts), strict=True
            ):
                mine[number] = found
            self._progress("loglikelihood", len(members) * size)
        every: dict[int, tuple[float, bool]] = {}
        for part in collectives.from_all_ranks(mine, group):
            every |= part
        return [every[number] for number in range(len(requests))]

    @torch.inference_mode()
    def _scores(
        self,
        batch: Sequence[tuple[int, ...]],
        rows: Sequence[int],
        scored: Sequence[list[int]],
    ) -> list[tuple[float, bool]]:
        """Of each list of tokens that ``scored`` has, after the row of the batch that it ends."""
        core = forward.unwrap(self.candidate.model)
        device = forward.device_of(core)
        inputs = pad_sequence([torch.tensor(each) for each in batch], batch_first=True).to(device)
        most = max(map(len, scored))
        last = torch.tensor([len(each) - 1 for each in batch], device=device)
        places = (last.unsqueeze(1) - torch.arange(most - 1, -1, -1, device=device)).clamp(min=0)
        logits = forward.run(core, inputs, places)
        found = None
        if logits is not None:
            found = torch.zeros(len(rows), 2, dtype=torch.float64, device=device)
            logarithms = logits.float().log_softmax(-1)
            for number, (row, tokens) in enumerate(zip(rows, scored, strict=True)):
                part = logarithms[row, most - len(tokens) :]
                right = torch.tensor(tokens, device=device)
                found[number, 0] = part.gather(1, right.unsqueeze(1)).sum()
                found[number, 1] = (part.argmax(-1) == right).all()
        found = forward.from_last_stage(found, (len(rows), 2), torch.float64)
        return [(value, bool(greedy)) for value, greedy in found.tolist()]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log probability of whole texts, in windows that do not overlap."""
        parts: list[_Request] = []
        texts: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for before, scored in map(make_disjoint_window, windows):
                parts.append((None, list(before), list(scored)))
                texts.append(number)
        found = [0.0] * len(requests)
        for number, (value, _) in zip(texts, self._loglikelihood_tokens(parts), strict=True):
            found[number] += value
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each cut at the first of its task's stop texts."""
        groups: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            texts = [requests[number].args[0] for number in numbers]
            answers = self._generate(texts, requests[numbers[0]].args[1])
            for number, answer in zip(numbers, answers, strict=True):
                found[number] = answer
        return found

    def _generate(self, texts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        how = normalize_gen_kwargs(settings, _MAX_NEW_TOKENS)
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(how.get("until"), eos=end)
        most = how["max_gen_toks"]
        room = harness_options.room(self.max_length, most)
        prompts = [self.tok_encode(text)[-room:] for text in texts]
        rank, size, group = generation.data_parallel()
        sampler = Sampler(
            temperature=how.get("temperature", 1.0) if how.get("do_sample") else 0.0,
            top_k=how.get("top_k", 0),
            top_p=how.get("top_p", 1.0),
            seed=self.seed,
            names=[str(number) for number in range(len(prompts))][rank::size],
        )
        new = generation.generate(
            self.candidate.model,
            prompts[rank::size],
            most,
            self.candidate.eos_ids,
            batching=Batching(self.batch_size, "--tasks-batch-size"),
            choose=sampler,
            ended=stopping.after(self.tokenizer, stops),
            progress=lambda done: self._progress("generate_until", done * size),
        )
        mine = [self.tokenizer.decode(each, skip_special_tokens=True) for each in new]
        found = [""] * len(prompts)
        for number, part in enumerate(collectives.from_all_ranks(mine, group)):
            found[number::size] = part
        return [gsm8k.cut(text, [stop for stop in stops if stop]) for text in found]
