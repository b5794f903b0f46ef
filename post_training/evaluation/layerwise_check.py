"""What ``evaluate --layerwise`` cannot do, refused before the work. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from post_training.checkpoints.source import Source
from post_training.common.errors import UsageError


def check(stages: int, questions: Sequence[str], source: Source) -> None:
    """Raise UsageError for what needs a whole model.

    Args:
        stages: of the pipeline.
        questions: names of measures that ask questions.
    """
    if questions:
        raise UsageError(
            f"--layerwise with {', '.join(questions)}",
            "questions are asked with a cache of keys and values of all layers; text is predicted",
            "give --text alone, or leave --layerwise out",
        )
    if stages > 1:
        raise UsageError(
            f"--layerwise with PP={stages}",
            "each rank has one layer at a time, and no part of the model for longer",
            "set PP=1: further GPUs share the text (DP)",
        )
    if (source.manifest or {}).get("quantization"):
        raise UsageError(
            f"--layerwise with {source.location}",
            "it is a quantized checkpoint, whose quantizers are restored on a whole model",
            "name its exported folder (bash export.sh), or leave --layerwise out",
        )
