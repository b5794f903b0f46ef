"""What a model takes once it is exported: its tensors are packed, counted and dropped."""

from __future__ import annotations

from megatron.core import parallel_state
from megatron.core.transformer import MegatronModule

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source
from post_training.config.options import StageOptions
from post_training.distributed.collectives import from_all_ranks
from post_training.distributed.session import Session
from post_training.export import model_folder
from post_training.export.carried import Carried
from post_training.models.builder import torch_dtype


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
    original = loading.local_huggingface(source, options)
    exporter, layout, _ = model_folder.open_exporter(model, original, options, target=target)
    dtype = torch_dtype(options.precision)
    count = 0
    if parallel_state.get_data_parallel_rank() == 0:
        groups = exporter.groups() if layout is None else layout.groups(exporter, dtype)
        count = sum(tensor.nbytes for group in groups for tensor in group.values())
    carried = Carried.of(original, session)
    count += sum(tensor.nbytes for group in carried.groups() for tensor in group.values())
    return sum(from_all_ranks(count))
