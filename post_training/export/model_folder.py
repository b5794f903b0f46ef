"""Writing a model as a Hugging Face folder, reading it back and comparing. Collective calls."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer import MegatronModule

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source
from post_training.config.options import StageOptions
from post_training.distributed.collectives import from_all_ranks
from post_training.distributed.session import Session
from post_training.export import folder, readback
from post_training.export.exporter import Exporter
from post_training.models.builder import torch_dtype
from post_training.quantization import quantizers

logger = logging.getLogger("post_training")


def write(
    model: MegatronModule,
    source: Source,
    options: StageOptions,
    session: Session,
    target: Path,
    *,
    max_shard_bytes: int,
    allow_unexportable: bool = False,
) -> dict[str, Any]:
    """Write ``model`` into the working folder of ``target`` and verify it. Returns the metrics.

    Raises:
        UsageError: if the format cannot be exported, or what was written is not the model.
    """
    dtype = torch_dtype(options.precision)
    if not allow_unexportable:
        quantizers.require_exportable(model)
    quantizers.unpack(model)
    exporter = Exporter(
        model,
        loading.local_huggingface(source, options),
        dtype,
        trust_remote_code=options.trust_remote_code,
    )
    work = folder.begin(target)
    exporter.write(work, max_shard_bytes, session.show_progress)
    return verify(exporter, work, dtype, session)


def verify(exporter: Exporter, work: Path, dtype: torch.dtype, session: Session) -> dict[str, Any]:
    """Read the folder back and compare it with the model. Returns the metrics.

    Raises:
        UsageError: naming the first differences, on every rank.
    """
    written = readback.Folder(work, session.device)
    problems = written.problems() if session.is_main else []
    names: list[str] = []
    for group in exporter.reference(session.show_progress):
        names += group
        problems += readback.compare(written, group.items(), dtype)
    compared = {name for each in from_all_ranks(names) for name in each}
    if session.is_main:
        missing = sorted(written.weight_names() - compared)
        problems += [f"{name} was not compared" for name in missing]
    folder.require_equal(problems, work)
    algorithm = written.quantization.get("quant_algo")
    logger.info("read back: %d tensors equal the model's, format %s", len(compared), algorithm)
    return {
        "tensors_compared": len(compared),
        "quant_algo": algorithm,
        "kv_cache_quant_algo": written.quantization.get("kv_cache_quant_algo"),
        "bits_per_weight": round(written.bits_per_weight(), 4),
    }
