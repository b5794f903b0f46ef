"""Writing an EAGLE-3 draft as a folder of its own, reading it back and comparing. Collective."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron.core.transformer import MegatronModule

from post_training.checkpoints import huggingface, loading
from post_training.checkpoints.source import Source
from post_training.common import files
from post_training.common.errors import UsageError
from post_training.config.options import StageOptions
from post_training.distributed.collectives import on_first_rank
from post_training.distributed.session import Session
from post_training.drafts.eagle3 import attach
from post_training.drafts.record import draft_of
from post_training.export.eagle3_exporter import DraftExporter
from post_training.export.eagle3_readback import DraftFolder
from post_training.export.fake_quantized import unpack
from post_training.export.folder import require_equal

logger = logging.getLogger("post_training")


def write(
    model: MegatronModule,
    source: Source,
    options: StageOptions,
    session: Session,
    target: Path,
    *,
    max_shard_bytes: int,
) -> dict[str, Any]:
    """Write the draft of ``model`` into the working folder of ``target`` and verify it.

    Returns:
        The metrics.

    Raises:
        UsageError: if the draft has no form that engines read, or what was written is not it.
    """
    if not attach.is_drafted(model):
        raise UsageError(f"--load {options.load}", "it has no draft", "name what eagle3.sh saved")
    unpack(model)
    configuration = loading.local_huggingface(source, options)
    exporter = DraftExporter(
        model,
        configuration,
        source.architecture.max_position_embeddings,
        trust_remote_code=options.trust_remote_code,
    )
    work = on_first_rank(lambda: files.begin(target))
    exporter.write(work, max_shard_bytes)
    written = DraftFolder(work)
    draft = draft_of(source)
    problems = list(written.differences(exporter.reference()))
    if session.is_main:
        layers = draft.aux_hidden_state_layer_ids if draft else None
        problems += written.problems(huggingface.read_config(configuration), layers)
    require_equal(problems, work)
    logger.info("read back: %d tensors equal the draft's", len(written.index))
    if draft is not None and not draft.trained:
        logger.warning("this draft has not been trained: its acceptance length is 1")
    return {
        "tensors_compared": len(written.index),
        "draft_vocab_size": written.config["draft_vocab_size"],
        "auxiliary_layers": written.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"],
    }
