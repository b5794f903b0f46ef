"""The folder of a training run: whether it is free, or holds a run to resume. No torch."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.checkpoints import torch_dist
from post_training.common import manifest, outputs, ownership
from post_training.common.errors import UsageError

logger = logging.getLogger("post_training")

FOLDER = "training"  # metrics, curves and packed data, beside the iterations
JOB = "slurm_job"  # in the manifest: which job trained last
_OWN = (FOLDER, torch_dist.HUGGINGFACE, torch_dist.TRACKER, manifest.FILE)


def last_iteration(folder: Path) -> int:
    """The newest iteration of a training run in ``folder``; 0 where there is none."""
    try:
        text = (folder / torch_dist.TRACKER).read_text(encoding="utf-8").strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0


def resumes(folder: Path, overwrite: bool) -> bool:
    """Whether there is a run in ``folder`` to resume.

    With ``overwrite`` a new run starts; but a job that SLURM queued again, with the command line
    that it had, resumes what it saved itself.
    """
    if not last_iteration(folder):
        return False
    if not overwrite:
        return True
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return restarts != "0" and (manifest.read(folder) or {}).get(JOB) == job


def require_same_experts(content: Mapping[str, Any], folder: Path, expert_parallel: int) -> None:
    """Raise UsageError for a run whose experts were divided by EP, and now are not, or vice versa.

    megatron-core then has one optimizer more, or less, for the experts' parameters.

    Args:
        content: of the run's manifest.
        folder: of the run.
        expert_parallel: EP of now.
    """
    before = (content.get("configuration") or {}).get("expert_model_parallel_size", 1)
    if before != expert_parallel and 1 in (before, expert_parallel):
        raise UsageError(
            f"EP={expert_parallel} with the run in {folder}",
            f"it was trained with EP={before}, and its optimizer's state is divided so",
            f"EP={before}; TP and PP may be others",
        )


def inputs_of_all(
    before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Inputs of a resumed run: those that its manifest has, and those of now that are others.

    A warning names each of the others: the iterations after the interruption are made from it.
    """
    known = [_content(each) for each in before]
    others = [dict(each) for each in now if _content(each) not in known]
    for each in others:
        logger.warning(
            "%s %s is not what the run read before the interruption: run.json has both",
            *(each["role"], each["path"]),
        )
    return [*map(dict, before), *others]


def _content(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What tells inputs apart: the hash, wherever it lies; the name where there is none."""
    hashed = {name: value for name, value in entry.items() if name != "path"}
    return hashed if len(hashed) > 1 else dict(entry)


def check_folder(
    folder: Path,
    stage: str,
    overwrite: bool = False,
    start: str | None = None,
    model: str | None = None,
) -> None:
    """Raise UsageError unless ``folder`` is free, or holds a run of ``stage`` to resume.

    Args:
        overwrite: whether a checkpoint or another run may lie there.
        start: a stage whose output may lie there too, to be trained in its place.
        model: what training would start from; a run that started from another is not resumed.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder}", "it is a file", "name a folder")
    # Iterations come and go inside the folder.
    outputs.writable(folder / torch_dist.TRACKER, f"output {folder}")
    if not folder.is_dir():
        return
    if overwrite:
        ownership.require_own(folder, outputs.CHECKPOINT, begun=(folder / FOLDER).is_dir())
        return
    what, content = f"output folder {folder}", manifest.read(folder) or {}
    made_by = content.get("stage")
    if last_iteration(folder):
        if made_by != stage:
            raise UsageError(
                what,
                f"it holds a training run of {made_by}, not of {stage}",
                "name another folder in MLM_MODEL_SAVE",
            )
        if model is not None:
            _require_same_start(folder, content, model)
        return
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in _OWN and not name.startswith(("iter_", "."))]
    if foreign and (start is None or made_by != start):
        raise UsageError(
            what,
            f"it is not empty and holds no training run ({', '.join(foreign[:3])})",
            "delete it, name another in MLM_MODEL_SAVE, or give --overwrite",
        )


def _require_same_start(folder: Path, content: Mapping[str, Any], model: str) -> None:
    """Raise UsageError if the run in ``folder`` started from another checkpoint than ``model``."""
    if Path(model).resolve() == folder.resolve() or not (Path(model) / manifest.FILE).is_file():
        return
    now = manifest.describe_input("model", model)
    for before in content.get("inputs", []):
        # A draft may be trained where convert.sh attached it: that checkpoint is gone.
        if before["role"] != "model" or Path(before["path"]) == folder.resolve():
            continue
        if before.get("manifest_sha256", now["manifest_sha256"]) != now["manifest_sha256"]:
            raise UsageError(
                f"output folder {folder}",
                f"the training run that it holds began with another model ({before['path']}) than "
                f"{model} is now",
                "name another folder in MLM_MODEL_SAVE, or give --overwrite to start over",
            )
