"""Logits and features at every position of a text: what tests compare with other implementations.

Every rank of a model calls with the same arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from post_training.drafts.eagle3.decoding import CachedDraft, CachedTarget
from post_training.inference import forward


@torch.inference_mode()
def prefill_logits(model: torch.nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits after every token: float32 [b, s, vocabulary] on every rank.

    Args:
        model: a GPTModel or HybridModel, built without sequence and context parallelism.
        input_ids: int64 [b, s].
    """
    core = forward.unwrap(model)
    input_ids = input_ids.to(forward.device_of(core))
    logits = forward.run(core, input_ids, None)
    if logits is not None:
        logits = logits.float()
    return forward.from_last_stage(logits, (*input_ids.shape, core.vocab_size), torch.float32)


@torch.inference_mode()
def draft_logits(
    model: torch.nn.Module, tokens: Sequence[int], features: torch.Tensor
) -> torch.Tensor:
    """The draft's logits at every position of a known text, on the last stage.

    Args:
        model: a drafted model.
        tokens: n + 1 token ids.
        features: [n, 1, layers * hidden] of the first n, as :func:`target_features` gives them.

    Returns:
        float32 [n, draft vocabulary]: row j, from token j + 1 and features j, predicts token j + 2.
    """
    draft = CachedDraft(forward.unwrap(model), len(tokens))
    ids = torch.tensor([list(tokens[1:])], device=features.device)
    output, _ = draft.run(ids, draft.fused(features))
    return draft.logits(output)[:, 0].float()


@torch.inference_mode()
def target_features(model: torch.nn.Module, tokens: Sequence[int]) -> torch.Tensor:
    """The features of ``tokens``, [n, 1, layers * hidden], on the last stage."""
    target = CachedTarget(forward.unwrap(model), len(tokens), None)
    target.choose(list(tokens), None, last_only=True)
    return target.features
