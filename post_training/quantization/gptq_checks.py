"""What GPTQ cannot be asked for. No torch."""

from __future__ import annotations

from post_training.common.errors import UsageError
from post_training.distributed.parallel import Parallel


def require_whole_layers(what: str, tensor: int, pipeline: int, expert_tensor: int) -> None:
    """Raise UsageError for parallel sizes at which a rank lacks what GPTQ needs."""
    if max(tensor, pipeline, expert_tensor) > 1:
        raise UsageError(
            f"{what} with TP={tensor} PP={pipeline} ETP={expert_tensor}",
            "GPTQ quantizes one layer after the other, from all inputs of its linears",
            "set TP=1 PP=1 ETP=1; DP and EP may be larger, and the checkpoint loads at any size",
        )


def check(what: str, sizes: Parallel, *, packed: bool, synced: bool) -> None:
    """Raise UsageError for flags that contradict GPTQ.

    Args:
        what: the format, in a message.
        sizes: a rank must have whole layers.
        packed: ``--compress``.
        synced: ``--sync-expert-weight-amax``.
    """
    require_whole_layers(what, sizes.tensor, sizes.pipeline, sizes.expert_tensor)
    if packed:
        raise UsageError(
            f"{what} --compress",
            "ModelOpt would pack other codes than GPTQ found",
            "leave the flag out; export.sh packs the weights",
        )
    if synced:
        raise UsageError(
            f"{what} --sync-expert-weight-amax",
            "GPTQ finds the scales of each expert's blocks while it changes the weights",
            "leave the flag out",
        )
