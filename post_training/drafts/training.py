"""What training a draft needs before its first step: samples, and a model with the draft."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints.source import Source
from post_training.common import files
from post_training.data import conversation_data
from post_training.data.sources import TextSource
from post_training.drafts import registry
from post_training.drafts.algorithm import DraftAlgorithm
from post_training.drafts.eagle3.draft import Draft
from post_training.drafts.features import Stored
from post_training.drafts.record import draft_of
from post_training.training.run import Run

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

logger = logging.getLogger("post_training")


def samples(
    run: Run, text: TextSource, stored: Stored | None, most_prompts: int
) -> tuple[Any, Any, list[list[int]]]:
    """Sequences to train on, held-out ones, and held-out prompts; a collective call.

    Args:
        run: the run.
        text: conversations.
        stored: features to read instead of ``text``.
        most_prompts: prompts at most.
    """
    if stored is not None:
        parts: Mapping[str, Any] = stored.parts()
        prompts = stored.prompts()
    else:
        parts, content = run.data(conversation_data.prepare, text)
        prompts = files.read_json(Path(content["prompts"])) or []
    return parts["train"], parts["valid"], prompts[:most_prompts]


def prepare(
    model: MegatronModule, draft: Draft, source: Source, train: Any, seed: int
) -> DraftAlgorithm:
    """Attach the draft where the source has none, choose its vocabulary, freeze its target.

    Args:
        model: this rank's part, in place.
        draft: to train.
        source: of the model.
        train: the samples, whose answers decide the vocabulary of a new draft.
        seed: of a new draft.
    """
    algorithm = registry.find(draft.algorithm)
    if draft_of(source) is None:
        algorithm.attach(model, draft, seed)
    if draft.has_own_vocabulary and not draft.trained:
        counts = conversation_data.frequencies(train, draft.config["vocab_size"])
        covered = algorithm.set_vocabulary(model, counts)
        logger.info(
            "draft vocabulary: %d of %d tokens, %.2f %% of the answers",
            draft.config["draft_vocab_size"],
            draft.config["vocab_size"],
            100 * covered,
        )
    algorithm.freeze_target(model)
    return algorithm
