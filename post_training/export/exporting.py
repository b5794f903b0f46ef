"""What every export is, from a checkpoint or right after quantization: its plan and its work.

Checks need no torch. The work is a collective call: write, read back, compare, publish.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source
from post_training.common import files
from post_training.common.errors import UsageError
from post_training.common.manifest import Manifest
from post_training.config.options import StageOptions
from post_training.distributed.parallel import Parallel
from post_training.drafts.record import draft_of
from post_training.export import target
from post_training.export.model_card import Card

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")

STAGE = "export"  # that the manifest of a folder names, whatever made it


@dataclass(frozen=True)
class ExportPlan:
    """What is written, and where.

    Attributes:
        target: the engine that the folder is for.
        shard_bytes: of the largest safetensors file.
        writes_model: not the draft alone.
        writes_draft: alone, or in a subfolder of the model's.
        simulated: weights are rounded and stored in 16 bits.
        allow_unexportable: also what the engine does not read correctly.
    """

    folder: Path
    target: str
    shard_bytes: int
    writes_model: bool = True
    writes_draft: bool = False
    simulated: bool = False
    allow_unexportable: bool = False


def with_draft(plan: ExportPlan, source: Source, *, alone: bool = False) -> ExportPlan:
    """The plan, with the checkpoint's draft if it has one.

    Raises:
        UsageError: for a draft that reads what the engine does not keep.
    """
    draft = draft_of(source)
    target.check_draft(draft, source, plan.target)
    return replace(plan, writes_model=not alone, writes_draft=alone or draft is not None)


def check_layout(sizes: Parallel, remedy: str) -> None:
    """Raise UsageError, with this remedy, for a layout in which no rank has whole tensors."""
    if sizes.tensor > 1 or sizes.expert > 1:
        raise UsageError(
            f"TP={sizes.tensor} EP={sizes.expert}",
            "ranks would write parts of tensors under whole names",
            remedy,
        )


def write(
    plan: ExportPlan,
    model: MegatronModule,
    source: Source,
    options: StageOptions,
    session: Session,
) -> dict[str, Any]:
    """Write the folder under its working name, read it back and compare. Returns the metrics.

    Raises:
        UsageError: if the format cannot be exported, or what was written is not the model.
    """
    from post_training.export import eagle3_exporter, model_folder, vllm_fakequant

    where = (source, options, session, plan.folder)
    if not plan.writes_model:
        return eagle3_exporter.write(model, *where, max_shard_bytes=plan.shard_bytes)
    unwritable = eagle3_exporter.why_not(model) if plan.writes_draft else None
    if plan.simulated:
        metrics = vllm_fakequant.write(model, *where, max_shard_bytes=plan.shard_bytes)
    else:
        metrics = model_folder.write(
            model,
            *where,
            max_shard_bytes=plan.shard_bytes,
            target=plan.target,
            allow_unexportable=plan.allow_unexportable,
        )
    if unwritable:
        logger.warning("the draft is not written: %s", unwritable)
        metrics["draft_left_out"] = unwritable
    elif plan.writes_draft:
        metrics["draft"] = eagle3_exporter.write(
            model, *where, max_shard_bytes=plan.shard_bytes, beside_target=True
        )
    return metrics


def publish(
    plan: ExportPlan, manifest: Manifest, source: Source, options: StageOptions
) -> dict[str, Any]:
    """Complete card and manifest and give the folder its name. Returns the manifest's content.

    Args:
        source: what :func:`write` was given.
    """
    from post_training.distributed.collectives import on_first_rank

    manifest.stage = STAGE
    manifest.extra["target"] = plan.target
    original = loading.local_huggingface(source, options)

    def work() -> dict[str, Any]:
        card = Card(plan.folder.resolve().name, source, original, manifest, plan.target)
        card.write(files.incomplete(plan.folder))
        content = manifest.write(files.incomplete(plan.folder))
        files.publish(plan.folder)
        return content

    return on_first_rank(work)
