"""An output layer that is the embedding: what the files of such a model must not contradict."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

from safetensors import safe_open

from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError
from post_training.common.safetensors_index import Entry


def require(index: Mapping[str, Entry], source: Source) -> None:
    """Raise UsageError for an output layer of its own where config.json says that there is none."""
    import torch

    names = ("lm_head.weight", "model.embed_tokens.weight")
    if not all(name in index for name in names):
        return
    with contextlib.ExitStack() as stack:
        head, embedding = (
            stack.enter_context(safe_open(index[name].path, framework="pt")).get_tensor(name)
            for name in names
        )
    if not torch.equal(head, embedding):
        raise UsageError(
            f"model {source.location}",
            "config.json says tie_word_embeddings, and lm_head.weight is not the embedding",
            "set tie_word_embeddings to false in a copy of config.json, which is what transformers "
            "does with such a model, or delete lm_head.weight if it is a leftover",
        )
