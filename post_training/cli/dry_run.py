"""``--dry-run``: what a stage would do, shown without loading anything. No torch.

Prints the architecture, the parameters of the model and of each rank, the layout of the processes,
and the line that starts them. Inputs that are not there yet (an earlier job of a pipeline makes
them) are taken to be the conf's model.
"""

from __future__ import annotations

import os
import shlex
import sys
from itertools import groupby

from post_training.checkpoints.source import Source
from post_training.common import redaction
from post_training.common.errors import UsageError
from post_training.config import model_description
from post_training.config.options import StageOptions
from post_training.distributed.parallel import Parallel
from post_training.models import parallel_check, parameter_count
from post_training.models.architecture import Architecture
from post_training.models.families import registry as families

# Values that say nothing new when they have megatron-core's default.
_ALWAYS = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size")


def show(options: StageOptions, source: Source | None) -> None:
    """Print what checked options ask for; UsageError for an unknown or indivisible model."""
    if source is None:
        _show_served(options)
        return
    described = source.described or model_description.architecture(options)
    sizes = options.parallel
    parallel_check.check(described, sizes)
    ranks = {}
    try:
        parameters = f"{parameter_count.total(described):,} ({options.precision})"
    except UsageError as error:  # a part whose parameters are not counted
        parameters = f"{error.what}: {error.cause}"
    else:
        ranks = {"per rank": _ranks(described, sizes)}
    rows = {
        "stage": options.stage,
        "model": f"{source.location}{'' if source.is_local else ' (not on this machine yet)'}",
        "architecture": _architecture(described),
        "parameters": parameters,
        "processes": _processes(sizes),
        **ranks,
        "launch line": launch_line(sizes.world),
    }
    from_flags = source.described is None or (source.is_checkpoint and source.manifest is None)
    assumed = model_description.assumption(options) if from_flags else None
    notes = [*([assumed] if assumed else []), *options.notices]
    reason = families.unconvertible(options.stated)
    if reason and not source.is_checkpoint:
        notes.insert(0, f"this cannot run yet: {reason}")
    for name, text in (*rows.items(), *(("note", text) for text in notes)):
        print(f"{name:13} {text}")


def _show_served(options: StageOptions) -> None:
    """Where a server is asked: nothing is known of the model before."""
    rows = {
        "stage": options.stage,
        "server": redaction.hide(str(options.given["server"])),
        "processes": "1, which loads no model",
        "launch line": launch_line(1),
    }
    for name, text in (*rows.items(), *(("note", text) for text in options.notices)):
        print(f"{name:13} {text}")


def launch_line(processes: int) -> str:
    """The line that starts the stage, without ``--dry-run``; quoted for a shell, tokens hidden."""
    words = shlex.split(os.environ.get("MLM_LAUNCH_LINE", ""))
    if not words:
        words = [sys.executable]
        if processes > 1:
            words += ["-P", "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        words += sys.argv
    return redaction.quoted([word for word in words if word not in ("--dry-run", "--check")])


def _architecture(architecture: Architecture) -> str:
    """Values by name that differ from megatron-core's defaults, and the essential ones."""
    plain = Architecture({}, 0, 0).resolved()
    skipped = architecture.irrelevant()
    return " ".join(
        f"{name}={_short(value)}"
        for name, value in architecture.resolved().items()
        if name in _ALWAYS or (name not in skipped and value != plain.get(name))
    )


def _short(value: object) -> str:
    """A value as a conf writes it: runs in a list are shortened to ``[0]*3+[1]*58``."""
    if not isinstance(value, list) or len(value) < 4:
        return str(value)
    return "+".join(f"[{entry}]*{len(list(run))}" for entry, run in groupby(value))


def _processes(sizes: Parallel) -> str:
    text = (
        f"{sizes.world}: TP={sizes.tensor} PP={sizes.pipeline} CP={sizes.context} "
        f"EP={sizes.expert} ETP={sizes.expert_tensor} DP={sizes.data}"
    )
    nodes = int(os.environ.get("MLM_PLANNED_NODES") or 1)
    if nodes > 1:
        text += f", on {nodes} nodes with {sizes.world // nodes} each"
    return text


def _ranks(architecture: Architecture, sizes: Parallel) -> str:
    """A line for each run of pipeline stages that are alike: layers, parameters of a rank."""
    ranks = sizes.world // sizes.pipeline
    lines, first = [], 0
    for (layers, parameters), run in groupby(parameter_count.per_stage(architecture, sizes)):
        count = len(list(run))
        name = f"stage {first}" if count == 1 else f"stages {first} to {first + count - 1}"
        lines.append(
            f"{name}: {layers} layers, {parameters:,} parameters on each of "
            f"{ranks} rank{'' if ranks == 1 else 's'}{'' if count == 1 else ' a stage'}"
        )
        first += count
    return f"\n{'':13} ".join(lines)
