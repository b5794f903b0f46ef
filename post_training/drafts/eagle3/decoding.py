"""Speculative decoding with an attached EAGLE-3 draft, one sequence at a time.

The draft proposes k tokens, the target verifies them in one forward pass over its cache of keys and
values, and the longest prefix that the target would have chosen itself is kept, plus the target's
next token: the result is that of greedy decoding, in fewer passes of the target.

What the draft sees (Li et al., EAGLE-3, 2025): at position j the embedding of token j + 1 and the
target's features of token j, the outputs of its auxiliary layers. From there it predicts token
j + 2. A proposal beyond that has no features yet and takes the draft's own output in their place;
after the verification those entries of the draft's cache are replaced by ones with real features.

Works with tensor and pipeline parallelism. On a pipeline the features travel to the last stage,
where the draft is, along with the activations. ModelOpt's own evaluation recomputes the whole
sequence for each step and supports no pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.inference.utils import InferenceMode

from post_training.drafts.acceptance import Acceptance, matching
from post_training.inference import forward


class GreedyChoice(NamedTuple):
    """A chosen token and the second best, with their logits."""

    token: int
    logit: float
    second: int
    second_logit: float

    @classmethod
    def of(cls, logits: torch.Tensor) -> GreedyChoice:
        """Of float32 [vocabulary]."""
        values, tokens = logits.topk(2)
        (first, second), (a, b) = tokens.tolist(), values.tolist()
        # Of equal logits argmax and topk may take different ones first.
        token = int(logits.argmax())
        return cls(token, a, second if token == first else first, b)


class Decoded(NamedTuple):
    """An answer's tokens, an end token included, and what each verification accepted of a draft."""

    tokens: list[int]
    accepted: list[int]


@torch.inference_mode()
def decode(
    model: torch.nn.Module,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    *,
    steps: int,
    vocab_size: int | None = None,
    watch: list[GreedyChoice] | None = None,
) -> Decoded:
    """Continue ``prompt`` until an end token or ``max_new_tokens``; every rank gets the result.

    Args:
        model: a drafted model that ``generation.supports_prefix``, built without sequence and
            context parallelism.
        prompt: at least one token.
        max_new_tokens: at least 1.
        eos_ids: tokens that end the answer.
        steps: draft tokens to propose to each verification, at least 1.
        vocab_size: choose among the first tokens only, where the output layer is padded.
        watch: on the last pipeline stage, filled with the choice behind each emitted token.
    """
    core = forward.unwrap(model)
    total = len(prompt) + max_new_tokens + steps + 1
    target = CachedTarget(core, total, vocab_size)
    draft = CachedDraft(core, total) if core.post_process else None
    emitted = target.choose(list(prompt), watch, last_only=True)
    # What the draft has not seen yet: tokens, each beside the features of the token before it.
    pending = [*prompt[1:], *emitted]
    new, accepted = list(emitted), []
    while len(new) < max_new_tokens and not any(token in eos_ids for token in emitted):
        proposal = None
        if draft is not None:
            proposal = draft.propose(pending, target.features[: len(pending)], steps)
        proposed = forward.from_last_stage(proposal, (steps,), torch.long).tolist()
        start = target.context.sequence_len_offset
        chosen = target.choose([new[-1], *proposed], watch)
        count = matching(proposed, chosen)
        emitted = chosen[: count + 1]
        if watch:
            del watch[len(new) + count + 1 :]
        # Forget what was not accepted.
        target.context.sequence_len_offset = start + count + 1
        pending = emitted
        new += emitted
        accepted.append(count)
    new = new[:max_new_tokens]
    end = next((place for place, token in enumerate(new) if token in eos_ids), len(new))
    return Decoded(new[: end + 1], accepted)


def measure(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    *,
    steps: int,
    vocab_size: int | None = None,
) -> Acceptance:
    """Decode ``prompts`` and say what was accepted: how good a draft is while it trains.

    Every module of the model is put into evaluation mode, and back into its own.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        found = [
            decode(model, prompt, max_new_tokens, eos_ids, steps=steps, vocab_size=vocab_size)
            for prompt in prompts
        ]
    finally:
        for module, training in modes.items():
            module.training = training
    return Acceptance(steps, [each.accepted for each in found])


class CachedTarget:
    """The target with its cache."""

    def __init__(self, core: Any, total: int, vocab_size: int | None) -> None:
        self.core = core
        self.context = forward.new_context(1, total)
        self.vocab_size = vocab_size
        self.device = forward.device_of(core)
        self.features = torch.empty(0)

    def choose(
        self, tokens: list[int], watch: list[GreedyChoice] | None, *, last_only: bool = False
    ) -> list[int]:
        """The most probable token after each of ``tokens``, which come after the cache.

        On the last stage ``features`` are then those of ``tokens``: [n, 1, layers * hidden].
        """
        ids = torch.tensor([tokens], device=self.device)
        last = torch.tensor([len(tokens) - 1], device=self.device) if last_only else None
        features: list[torch.Tensor] = []
        logits = forward.run(self.core, ids, last, self.context, features)
        chosen = None
        if logits is not None:
            self.features = torch.cat(features, dim=-1)
            rows = logits[0, :, : self.vocab_size].float()
            chosen = rows.argmax(dim=-1)
            if watch is not None:
                watch.extend(GreedyChoice.of(row) for row in rows)
        count = 1 if last_only else len(tokens)
        return forward.from_last_stage(chosen, (count,), torch.long).tolist()


class CachedDraft:
    """The draft with its cache; on the last pipeline stage only."""

    def __init__(self, core: Any, total: int) -> None:
        self.core = core
        self.module = core.eagle_module.eval()
        self.context = forward.new_context(1, total)
        self.rotary = self.module.rotary_pos_emb(total)
        self.device = forward.device_of(core)
        # The draft keeps the precision it was made in, whatever the target is loaded in.
        self.dtype = self.module.fc.weight.dtype

    def propose(self, tokens: Sequence[int], features: torch.Tensor, steps: int) -> torch.Tensor:
        """int64 [steps]: the tokens that probably follow ``tokens``.

        Args:
            tokens: those that are new since the last call.
            features: of the tokens before each of them, [n, 1, layers * hidden].
        """
        ids = torch.tensor([list(tokens)], device=self.device)
        hidden = self.fused(features)
        known = int(self.context.sequence_len_offset) + len(tokens)
        proposal = []
        for _ in range(steps):
            output, hidden = self.run(ids, hidden)
            token = self.logits(output[-1:])[0, 0].argmax()
            if hasattr(self.module, "d2t"):
                token = token + self.module.d2t[token]
            ids, hidden = token.view(1, 1), hidden[-1:]
            proposal.append(token)
        # The next call brings features for what was guessed here.
        self.context.sequence_len_offset = known
        return torch.stack(proposal)

    def fused(self, features: torch.Tensor) -> torch.Tensor:
        """[n, 1, layers * hidden] -> [n, 1, hidden]."""
        mixed: torch.Tensor = self.module.fc(features.to(self.dtype))[0]
        return mixed

    def run(self, ids: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The draft's layers after its cache, for ids [1, n] and hidden states [n, 1, hidden].

        Returns outputs for the head, and for the next step (before the last norm), like ``hidden``.
        """
        offset, length = int(self.context.sequence_len_offset), ids.shape[1]
        positions = torch.arange(offset, offset + length, device=self.device).unsqueeze(0)
        # The draft is built for masks of any form, as its training needs. Here attention is causal.
        kind, mask = "causal", None
        if offset and length == 1:
            kind = "no_mask"
        elif offset:
            kind, mask = "arbitrary", forward.causal_mask(offset, length, self.device)
        layers = self.module.decoder.layers
        with InferenceMode.active(), forward.attention_mask_type(layers, kind):
            embedded = self.core.embedding(input_ids=ids, position_ids=positions).to(self.dtype)
            output, following = self.module(
                embedded, hidden, mask, self.rotary, inference_context=self.context
            )
        self.context.sequence_len_offset += length
        self.context.enable_decode_mode()
        return output, following

    def logits(self, output: torch.Tensor) -> torch.Tensor:
        """[n, 1, hidden] -> [n, 1, draft vocabulary], whole on every tensor-parallel rank."""
        weight = None
        head = getattr(self.module, "eagle_output_layer", None)
        if head is None:
            head = self.core.output_layer
            if self.core.share_embeddings_and_output_weights:
                weight = self.core.shared_embedding_or_output_weight()
            output = output.to(forward.dtype_of(self.core))
        logits: torch.Tensor = head(output, weight=weight, runtime_gather_output=True)[0]
        return logits
