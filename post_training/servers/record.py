"""What a stage records of a run in which a server did what the model would."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from post_training.checkpoints import record
from post_training.common.manifest import Manifest
from post_training.config.options import StageOptions
from post_training.distributed.session import Session
from post_training.servers.identity import Server


def of_run(
    options: StageOptions,
    session: Session,
    server: Server,
    *,
    inputs: Sequence[Mapping[str, Any]],
    metrics: Mapping[str, Any],
) -> Manifest:
    """The manifest of a run; the architecture is not known."""
    return Manifest(
        options.stage,
        {},
        configuration=dict(options.given),
        inputs=record.with_named(inputs, session),
        metrics=dict(metrics),
        started=session.started,
        peak_memory_bytes=session.peak_memory(),
        extra={"server": server.to_json()},
    )
