"""What a stage records of its run: ``run.json`` of an output, or a report about a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from post_training.checkpoints.source import Source
from post_training.common import kept_warnings, manifest, redaction
from post_training.common.manifest import Manifest
from post_training.config.options import StageOptions
from post_training.distributed.session import Session

# Flags that name files or folders which decide a result, besides models and data.
_DECIDE = (
    *("tokenizer_model", "recipe", "eagle_config", "draft_model_path"),
    *("export_kd_cfg", "export_kd_teacher_model_config", "mmlu_dataset", "ground_truth_path"),
)


def named_inputs(options: StageOptions) -> list[dict[str, Any]]:
    """Local files and folders that flags name, as they are now: before they are read."""
    named = {name: options.given[name] for name in _DECIDE if options.given.get(name)}
    return [
        manifest.describe_input(name, value)
        for name, value in named.items()
        if Path(str(value)).exists()
    ]


def with_named(inputs: Iterable[Mapping[str, Any]], session: Session) -> list[dict[str, Any]]:
    """``inputs`` and what flags named besides, once each."""
    found = [dict(each) for each in inputs]
    known = [{**each, "role": ""} for each in found]
    return found + [each for each in session.named_inputs if {**each, "role": ""} not in known]


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

    ``architecture`` and ``inputs`` are given where they are not the source's; ``extra`` has further
    entries, such as ``quantization``.
    """
    return Manifest(
        options.stage,
        dict(architecture or source.architecture.to_json()),
        configuration=dict(options.given),
        inputs=with_named(source.inputs() if inputs is None else inputs, session),
        metrics=dict(metrics or {}),
        started=session.started,
        peak_memory_bytes=session.peak_memory(),
        extra=dict(extra or {}),
    )


def report_of_run(
    options: StageOptions,
    session: Session,
    inputs: Iterable[Mapping[str, Any]],
    found: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of a report, for a stage that makes nothing but one; a collective call.

    ``inputs`` are as ``manifest.describe_input`` describes them; ``found`` is by name.
    """
    return {
        "stage": options.stage,
        "command": redaction.command(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "configuration": redaction.hide_in(dict(options.given)),
        "inputs": with_named(inputs, session),
        **found,
        "warnings": kept_warnings.messages(),
        "peak_memory_bytes": session.peak_memory(),
        "parallel": {
            "tensor": session.parallel.tensor,
            "pipeline": session.parallel.pipeline,
            "data": session.parallel.data,
        },
        "versions": manifest.versions(),
        "git_commit": manifest.git_commit(),
    }
