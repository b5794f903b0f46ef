"""What a stage records of its run in ``run.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints.source import Source
from post_training.common.manifest import Manifest
from post_training.config.options import StageOptions

if TYPE_CHECKING:
    from post_training.distributed.session import Session


def of_run(
    options: StageOptions,
    session: Session,
    source: Source,
    *,
    architecture: Mapping[str, Any] | None = None,
    inputs: Sequence[Mapping[str, Any]] | None = None,
    metrics: Mapping[str, Any] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Manifest:
    """The manifest of a run up to now; a collective call, since it asks all ranks for their memory.

    Args:
        architecture: of the output, where it is not the source's.
        inputs: where they are more than the source.
        metrics: of the stage, by name.
        extra: further entries, such as ``quantization``.
    """
    return Manifest(
        options.stage,
        dict(architecture or source.architecture.to_json()),
        configuration={name: _json(value) for name, value in options.given.items()},
        inputs=[dict(each) for each in (source.inputs() if inputs is None else inputs)],
        metrics=dict(metrics or {}),
        started=session.started,
        peak_memory_bytes=session.peak_memory(),
        extra=dict(extra or {}),
    )


def _json(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
