"""The draft that a checkpoint holds beside its target, and the one to train. No torch."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from post_training.checkpoints import torch_dist
from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError
from post_training.config.flags import spelled
from post_training.config.options import StageOptions
from post_training.data import conversation_data
from post_training.drafts import options as draft_options
from post_training.drafts import registry
from post_training.drafts.algorithm import DraftAlgorithm
from post_training.drafts.eagle3.draft import DTYPE_NAMES, Draft, require_exportable
from post_training.drafts.options import DraftOptions

logger = logging.getLogger("post_training")

SUBFOLDER = "draft"  # of an exported target


def draft_of(source: Source) -> Draft | None:
    """The draft of a checkpoint; None without one."""
    content = (source.manifest or {}).get("draft")
    return Draft.from_json(content) if content else None


def require_draft(source: Source, options: StageOptions) -> None:
    """Raise UsageError unless the source is a checkpoint with a draft."""
    if not source.is_checkpoint:
        raise UsageError(
            f"--pretrained-model-path {source.location}",
            "a Hugging Face folder has no draft",
            "set MLM_MODEL_CKPT to what eagle3.sh saved",
        )
    if options.dry_run and not source.is_local:
        return  # an earlier job is going to make it
    folder = Path(source.location)
    if draft_of(source) is None and not any(
        torch_dist.holds(folder, f"{each.module}.") for each in registry.ALGORITHMS.values()
    ):
        raise UsageError(
            f"--load {options.load}",
            "it has no draft",
            "name what eagle3.sh saved, or attach one: convert.sh <conf> --algorithm eagle3",
        )


def is_exported_alone(source: Source, options: StageOptions, *, asked: bool, offline: bool) -> bool:
    """Whether an export writes the draft without its target.

    Args:
        asked: to write the draft alone.
        offline: the checkpoint is said to have no layers of the target.

    Raises:
        UsageError: if it has them, or no draft, or one of a form that no engine has.
    """
    draft = draft_of(source)
    has_layers = source.is_local and not (draft and draft.offline)
    if offline and has_layers:
        raise UsageError(
            f"--export-offline-model --load {options.load}",
            "the checkpoint has its target's layers",
            "leave the flag out: model and draft are written; --export-extra-modules writes the "
            "draft alone",
        )
    alone = asked or offline or bool(draft and draft.offline)
    if alone:
        require_draft(source, options)
        if draft is not None:
            require_exportable(draft.config, f"--load {options.load}")
    return alone


def recorded_or_planned(wanted: DraftOptions, options: StageOptions, source: Source) -> Draft:
    """The draft of the checkpoint, or the one that the flags describe for this target."""
    planned = draft_options.plan(wanted, options, source.architecture)
    return draft_of(source) or planned


def to_train(
    wanted: DraftOptions, options: StageOptions, source: Source, *, offline: bool
) -> Draft:
    """The draft to train, as :func:`recorded_or_planned`; ``offline`` from stored features.

    Raises:
        UsageError: if the flags contradict the checkpoint's draft, or the target's layers are
            needed and left out.
    """
    planned = draft_options.plan(wanted, options, source.architecture)
    recorded = draft_of(source)
    if recorded is None:
        return planned
    location = source.location
    made, now = recorded.config["torch_dtype"], DTYPE_NAMES[options.precision]
    if made != now:
        precision = next(f"--{name}" for name, dtype in DTYPE_NAMES.items() if dtype == made)
        raise UsageError(
            f"{location} trained in {now}",
            f"its draft was made in {made}",
            f"add {precision}, or make the draft again in {now}",
        )
    for option, value, old in _described(planned, recorded, options):
        if value != old:
            raise UsageError(
                f"{option} {value}",
                f"the draft in {location} was made with {old}",
                "leave it out, or start a new run in another folder",
            )
    if recorded.offline and not offline:
        raise UsageError(
            f"--load {location}",
            "it was made without the target's layers (--export-offline-model)",
            "give --offline-distillation-data, or a checkpoint with its layers",
        )
    return recorded


def _described(
    planned: Draft, recorded: Draft, options: StageOptions
) -> Iterator[tuple[str, Any, Any]]:
    """What the given flags say about the draft: option, its value, that of the recorded draft."""
    for name in ("ttt_steps", "mix_hidden_states"):
        if name in options.given:
            yield spelled(name), getattr(planned, name), getattr(recorded, name)
    size = "draft_vocab_size"
    if size in options.given:
        yield spelled(size), planned.config[size], recorded.config[size]
    if "eagle_config" in options.given:
        for key, value in planned.config.items():
            yield f"--eagle-config {key}", value, recorded.config.get(key)


def prepare(model: Any, draft: Draft, source: Source, train: Any, seed: int) -> DraftAlgorithm:
    """Attach the draft where the source has none, choose its vocabulary, freeze its target.

    The answers of the samples ``train`` decide the vocabulary of a new draft.
    """
    algorithm = registry.find(draft.algorithm)
    if draft_of(source) is None:
        algorithm.attach(model, draft, seed)
    if draft.has_own_vocabulary and not draft.trained:
        size, tokens = draft.config["draft_vocab_size"], draft.config["vocab_size"]
        covered = algorithm.set_vocabulary(model, conversation_data.frequencies(train, tokens))
        logger.info(
            "draft vocabulary: %d of %d tokens, %.2f %% of the answers", size, tokens, 100 * covered
        )
    algorithm.freeze_target(model)
    return algorithm
