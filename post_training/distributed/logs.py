"""What a stage logs, and what it keeps of the logs and warnings of others."""

from __future__ import annotations

import logging
import sys
import warnings

from post_training.common import kept_warnings
from post_training.distributed import placement

logger = logging.getLogger("post_training")

# What megatron-core logs all through a run and no user can act on.
_ONLY_ERRORS = (
    "megatron.core.distributed",  # on every start, how gradients are laid out
    "megatron.core.dist_checkpointing.strategies.torch",  # saves are synchronous: chosen here
    "megatron.core.models.hybrid.hybrid_layer_allocation",  # the layers of each stage
    "megatron.core.models.gpt.gpt_model",  # GPTModel will be replaced: chosen in models/builder.py
)


def configure(stage: str, level: str = "info") -> None:
    """Rank 0 logs to stderr as ``[stage] message``; other ranks log warnings only.

    What other packages say through Python's ``warnings`` is shown at level ``debug``, and ends no
    stage (PYTHONWARNINGS=error): it is about their own insides and hides what a stage says.
    """
    rank = placement.placement().rank
    handler = logging.StreamHandler(sys.stderr)
    prefix = f"[{stage}]" if rank == 0 else f"[{stage} rank {rank}]"
    handler.setFormatter(logging.Formatter(f"{prefix} %(message)s"))
    warned = logging.getLogger("py.warnings")
    logger.handlers[:] = [handler, kept_warnings.Keeper()]
    warned.handlers[:] = [handler]
    for each in (logger, warned):
        each.propagate = False
    chosen = logging.getLevelNamesMapping()[level.upper()]
    logger.setLevel(chosen if rank == 0 else max(chosen, logging.WARNING))
    if sys.warnoptions:
        warnings.simplefilter("default")
    logging.captureWarnings(True)
    warned.setLevel(logging.WARNING if chosen <= logging.DEBUG else logging.ERROR)
    for name in _ONLY_ERRORS:
        logging.getLogger(name).setLevel(logging.ERROR)
