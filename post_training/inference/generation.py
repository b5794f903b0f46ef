"""Running a megatron-core model forward: logits of chosen positions, and generation.

Works with tensor and pipeline parallelism; every rank of a replica calls with the same arguments
and gets the same result. Three things keep it fast and small:

- The output layer sees only the positions that are asked for (a forward pre-hook gathers them),
  never a whole [batch, sequence, vocabulary].
- Masks are implied by the causal attention type. Padding is on the right, where causal attention
  hides it from the tokens before it.
- Pipeline stages exchange activations; only the chosen logits or tokens travel back.

The output layer is called as a module, so that tied embeddings, logit scaling and quantizers act
as in training.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from post_training.inference import forward
from post_training.inference.batching import Batching, rotates_by_length
from post_training.inference.sampling import greedy

if TYPE_CHECKING:
    from megatron.core.inference.contexts import StaticInferenceContext

_DEFAULT_BATCH = 16
# Logits [b, vocabulary], the prompt's index of each row, the tokens it has generated -> int64 [b].
Choose = Callable[[torch.Tensor, Sequence[int], Sequence[int]], torch.Tensor]


@torch.inference_mode()
def last_logits(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    lengths: Sequence[int],
    token_ids: Sequence[int] | None = None,
    prefix: Prefix | None = None,
) -> torch.Tensor:
    """Logits after the last token of each sequence.

    Args:
        model: a GPTModel or HybridModel, built without sequence and context parallelism.
        input_ids: int64 [b, s], padded on the right with any token; as many as
            :func:`.batching.alike` puts together.
        lengths: true length of each sequence, 1 to s.
        token_ids: give the logits of these tokens only.
        prefix: what stands before every sequence, computed by :func:`prefill_prefix`.

    Returns:
        float32 [b, vocabulary], or [b, len(token_ids)], on every rank.
    """
    core = forward.unwrap(model)
    input_ids = input_ids.to(forward.device_of(core))
    positions = torch.tensor(list(lengths), device=input_ids.device) - 1
    context = None if prefix is None else prefix.context(*input_ids.shape)
    logits = forward.run(core, input_ids, positions, context)
    columns = core.vocab_size if token_ids is None else len(token_ids)
    if logits is not None:
        logits = logits[:, 0].float()
        if token_ids is not None:
            logits = logits[:, torch.tensor(list(token_ids), device=logits.device)]
    return forward.from_last_stage(logits, (len(input_ids), columns), torch.float32)


@dataclass(frozen=True)
class Prefix:
    """Keys and values of ``length`` tokens that several sequences begin with.

    ``layers``: layer number -> keys and values, [length, 1, groups, dim] each, of this rank.
    """

    length: int
    layers: dict[int, tuple[torch.Tensor, torch.Tensor]]

    def context(self, batch: int, length: int) -> StaticInferenceContext:
        """A cache for ``batch`` sequences of ``length`` further tokens, holding the prefix."""
        context = forward.new_context(batch, self.length + length)
        for layer, pair in self.layers.items():
            memories = []
            for tensor in pair:
                memory = tensor.new_empty(self.length + length, batch, *tensor.shape[2:])
                memory[: self.length] = tensor
                memories.append(memory)
            context.key_value_memory_dict[layer] = tuple(memories)
        context.sequence_len_offset = self.length
        return context


def supports_prefix(model: torch.nn.Module) -> bool:
    """Whether :func:`prefill_prefix` works: full causal attention with a key-value cache only.

    State-space layers keep another state; sliding windows and attention chunks would need their
    own masks; dynamic rotary positions differ with the length of the whole text.
    """
    from megatron.core.transformer.attention import Attention

    core = forward.unwrap(model)
    config = core.config
    if rotates_by_length(core):
        return False
    if getattr(config, "window_size", None) or getattr(config, "attention_chunk_size", None):
        return False
    layers = core.decoder.layers
    return all(isinstance(getattr(layer, "self_attention", None), Attention) for layer in layers)


@torch.inference_mode()
def prefill_prefix(model: torch.nn.Module, tokens: Sequence[int]) -> Prefix:
    """Compute the keys and values of ``tokens`` once, for the sequences that begin with them.

    The five-shot prompts of an MMLU subject share all but the question: 4/5 of the tokens.
    ``model`` is one that :func:`supports_prefix`.
    """
    core = forward.unwrap(model)
    input_ids = torch.tensor([list(tokens)], device=forward.device_of(core))
    context = forward.new_context(1, len(tokens))
    forward.run(core, input_ids, torch.zeros(1, dtype=torch.long, device=input_ids.device), context)
    return Prefix(len(tokens), dict(context.key_value_memory_dict))


@torch.inference_mode()
def generate(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    eos_ids: Sequence[int] = (),
    *,
    batching: Batching | None = None,
    use_cache: bool = True,
    vocab_size: int | None = None,
    choose: Choose = greedy,
    ended: Callable[[Sequence[int]], bool] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """Continue each prompt until an end token, ``max_new_tokens``, or what ``ended`` says.

    A static cache holds one position for all sequences of a batch. Prompts of different lengths
    therefore run together as in Megatron's static engine: the batch is prefilled up to its
    shortest prompt, then goes token by token, longer prompts being fed their own tokens until
    they end. Nothing is padded, so each sequence is computed as if alone. When half of a batch
    has finished, the others continue in a smaller one.

    Args:
        model: as :func:`last_logits`.
        prompts: token ids, at least one each.
        max_new_tokens: most tokens to add to each, one number or one for each prompt.
        eos_ids: tokens that end a sequence; the end token is part of the result.
        batching: sequences at a time; by default at most 16.
        use_cache: False computes the whole sequence again for each token (for comparisons).
        vocab_size: choose among the first tokens only, where the output layer is padded.
        choose: from float32 logits [b, vocabulary], the index in ``prompts`` of each row and the
            number of tokens it has generated, to tokens [b]. It runs on every tensor-parallel rank
            of the last stage and must give the same on each; see :mod:`.sampling`.
        ended: of the new tokens of one sequence, whether it is complete, such as after a certain
            text; it runs on every rank and must say the same on each.
        progress: called with the number of finished prompts after each batch.

    Returns:
        The new tokens of each prompt, in the order of ``prompts``.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty: generation needs at least one token to start from")
    core = forward.unwrap(model)
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens

    def complete(index: int, found: Sequence[int]) -> bool:
        at_end = len(found) >= limits[index] or found[-1] in eos_ids
        return at_end or (ended is not None and ended(found))

    results: list[list[int]] = [[] for _ in prompts]
    if max(limits, default=0) < 1:
        return results
    spread = 0 if rotates_by_length(core) else max(limits)
    batching = batching or Batching(_DEFAULT_BATCH, "the batch size")

    def decode(some: Sequence[int]) -> dict[int, list[int]]:
        return _decode(core, prompts, some, limits, complete, use_cache, vocab_size, choose)

    most = batching.fixed if batching.is_given else len(prompts)
    for group in _groups([len(prompt) for prompt in prompts], most, spread):
        for some, new in batching.over(
            core,
            group,
            decode,
            positions=lambda index: len(prompts[index]) + limits[index],
            tokens=lambda index: len(prompts[index]),
        ):
            for index, found in new.items():
                results[index] = found
            if progress is not None:
                progress(len(some))
    return results


def _groups(lengths: Sequence[int], batch_size: int, spread: int) -> list[list[int]]:
    """Indices by length, at most ``batch_size`` together.

    Lengths of a group differ by at most ``spread``: feeding a longer prompt token by token costs
    what generating does, and should not cost more than the generation itself.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        group = groups[-1] if groups else []
        if group and len(group) < batch_size and lengths[index] - lengths[group[0]] <= spread:
            group.append(index)
        else:
            groups.append([index])
    return groups


def _decode(
    core: Any,
    prompts: Sequence[Sequence[int]],
    group: Sequence[int],
    limits: Sequence[int],
    complete: Callable[[int, Sequence[int]], bool],
    use_cache: bool,
    vocab_size: int | None,
    choose: Choose,
) -> dict[int, list[int]]:
    """New tokens of the prompts in ``group``, which are decoded together."""
    total = max(len(prompts[index]) + limits[index] for index in group)
    tokens = pad_sequence([torch.tensor(prompts[index]) for index in group], batch_first=True)
    tokens = torch.nn.functional.pad(tokens, (0, total - tokens.shape[1]))
    tokens = tokens.to(forward.device_of(core))
    context = forward.new_context(len(group), total) if use_cache else None
    new: dict[int, list[int]] = {index: [] for index in group}
    rows = list(group)  # those that are not finished yet, and some that are
    finished = {index for index in group if limits[index] < 1}
    start = 0
    # Of longer texts all tokens are rotated otherwise, which changes what every layer gives.
    switch = getattr(getattr(core, "rotary_pos_emb", None), "switches_after", None) or total
    for end in range(min(len(prompts[index]) for index in group), total):
        if context is not None and 0 < start <= switch < end:
            context, start = forward.new_context(len(rows), total), 0
        last = torch.full((len(rows),), end - start - 1, device=tokens.device)
        logits = forward.run(core, tokens[:, start:end], last, context)
        chosen = None
        if logits is not None:
            generated = [len(new[index]) for index in rows]
            chosen = choose(logits[:, 0, :vocab_size].float(), rows, generated).to(torch.long)
        chosen = forward.from_last_stage(chosen, (len(rows),), torch.long)
        if context is not None:
            start = end
        alive = []
        for i, (index, token) in enumerate(zip(rows, chosen.tolist(), strict=True)):
            if end >= len(prompts[index]) and index not in finished:
                tokens[i, end] = token
                new[index].append(token)
                if complete(index, new[index]):
                    finished.add(index)
            if index not in finished:
                alive.append(i)
        if not alive:
            break
        if 2 * len(alive) <= len(rows):
            rows = [rows[i] for i in alive]
            kept = torch.tensor(alive, device=tokens.device)
            tokens = tokens[kept]
            if context is not None:
                forward.select(context, kept)
    return new


def data_parallel() -> tuple[int, int, Any]:
    """Rank, size and group over which independent batches may be split.

    With expert parallelism the ranks of an expert group exchange tokens in every layer and must
    run the same batches, so only replicas of all experts count as data-parallel.
    """
    from megatron.core import parallel_state as state

    group = (
        state.get_expert_data_parallel_group()
        if state.get_expert_model_parallel_world_size() > 1
        else state.get_data_parallel_group()
    )
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group), group
