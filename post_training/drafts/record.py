"""The draft that a checkpoint holds beside its target, from its manifest. No torch."""

from __future__ import annotations

from pathlib import Path

from post_training.checkpoints import torch_dist
from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError
from post_training.config.options import StageOptions
from post_training.drafts.eagle3.draft import Draft


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
    if draft_of(source) is None and not torch_dist.holds(Path(source.location), "eagle_module."):
        raise UsageError(
            f"--load {options.load}",
            "it has no draft",
            "name what eagle3.sh saved, or attach one: convert.sh <conf> --algorithm eagle3",
        )
