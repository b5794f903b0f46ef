"""The draft that a checkpoint holds beside its target, and the one to work with. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from post_training.checkpoints import torch_dist
from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError
from post_training.config.flags import spelled
from post_training.config.options import StageOptions
from post_training.drafts import options as draft_options
from post_training.drafts.eagle3.draft import DTYPE_NAMES, Draft
from post_training.drafts.options import DraftOptions
from post_training.drafts.registry import ALGORITHMS


def draft_of(source: Source) -> Draft | None:
    """The draft of a checkpoint; None without one."""
    content = (source.manifest or {}).get("draft")
    return Draft.from_json(content) if content else None


def require_draft(source: Source, options: StageOptions) -> None:
    """Raise UsageError unless the source is a checkpoint with a draft. No torch."""
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
        torch_dist.holds(folder, f"{each.module}.") for each in ALGORITHMS.values()
    ):
        raise UsageError(
            f"--load {options.load}",
            "it has no draft",
            "name what eagle3.sh saved, or attach one: convert.sh <conf> --algorithm eagle3",
        )


def recorded_or_planned(wanted: DraftOptions, options: StageOptions, source: Source) -> Draft:
    """The draft of the checkpoint, or the one that the flags describe for this target."""
    planned = draft_options.plan(wanted, options, source.architecture)
    return draft_of(source) or planned


def to_train(
    wanted: DraftOptions, options: StageOptions, source: Source, *, offline: bool
) -> Draft:
    """The draft to train: as :func:`recorded_or_planned`.

    Args:
        wanted: the draft's flags.
        options: the stage's.
        source: the target, with or without a draft.
        offline: whether stored features stand for the target's layers.

    Raises:
        UsageError: if the flags contradict the checkpoint's draft, or the target's layers are
            needed and left out.
    """
    planned = draft_options.plan(wanted, options, source.architecture)
    recorded = draft_of(source)
    if recorded is None:
        return planned
    _check_unchanged(recorded, planned, options, source.location)
    if recorded.offline and not offline:
        raise UsageError(
            f"--load {source.location}",
            "it was made without the target's layers (--export-offline-model)",
            "give --offline-distillation-data, or a checkpoint with its layers",
        )
    return recorded


def _check_unchanged(recorded: Draft, planned: Draft, options: StageOptions, location: str) -> None:
    """Raise UsageError if the flags contradict the draft that is to be trained.

    Args:
        recorded: the draft of the checkpoint.
        planned: what the flags describe.
        options: the stage's.
        location: of the checkpoint.
    """
    made, wanted = recorded.config["torch_dtype"], DTYPE_NAMES[options.precision]
    if made != wanted:
        precision = next(f"--{name}" for name, dtype in DTYPE_NAMES.items() if dtype == made)
        raise UsageError(
            f"{location} trained in {wanted}",
            f"its draft was made in {made}",
            f"add {precision}, or make the draft again in {wanted}",
        )
    now, before = _described(planned), _described(recorded)
    wrong = [
        (spelled(name), now[name], before[name])
        for name in before
        if name in options.given and now[name] != before[name]
    ]
    if "eagle_config" in options.given:
        wrong += [
            (f"--eagle-config {key}", value, recorded.config.get(key))
            for key, value in planned.config.items()
            if value != recorded.config.get(key)
        ]
    for option, value, old in wrong:
        raise UsageError(
            f"{option} {value}",
            f"the draft in {location} was made with {old}",
            "leave it out, or start a new run in another folder",
        )


def _described(made: Draft) -> dict[str, Any]:
    """What flags of their own describe, by field name."""
    return {
        "ttt_steps": made.ttt_steps,
        "mix_hidden_states": made.mix_hidden_states,
        "draft_vocab_size": made.config["draft_vocab_size"],
    }
