"""What a model takes once it is exported: its tensors are packed, counted and dropped."""

from __future__ import annotations

from itertools import chain

from megatron.core.transformer import MegatronModule

from post_training.checkpoints.source import Source
from post_training.config.options import StageOptions
from post_training.distributed.collectives import from_all_ranks
from post_training.distributed.session import Session
from post_training.export.fake_quantized import unpack
from post_training.export.model_folder import Writer


def stored_bytes(
    model: MegatronModule,
    source: Source,
    options: StageOptions,
    session: Session,
    *,
    target: str,
) -> int:
    """Bytes of the tensors that an export of ``model`` has; a collective call.

    Args:
        model: this rank's part, tensor-parallel size 1.
        target: the engine that is to read it, by its name in ``--target``.
    """
    writer = Writer(model, source, options, session, target)
    unpack(model)
    groups = chain(writer.groups(), writer.carried.groups())
    count = sum(tensor.nbytes for group in groups for tensor in group.values())
    return sum(from_all_ranks(count))
