"""Judge the output of a stage: whole or not, and the same as another run's or not."""

from __future__ import annotations

import io
import math
import tempfile
from pathlib import Path
from typing import Any

from tiny_stages import REPORTS, RESUMED, Variety

from post_training.common import files, hashing, manifest

# What differs between two runs that computed the same.
_RUN = {"command", "configuration", "finished", "git_commit", "peak_memory_bytes", "seconds"}
_RUN |= {"plain_tokens_per_second", "speculative_tokens_per_second", "speed_up"}
_EXTRA = "_extra_state/"  # ModelOpt's, pickled: sets in it have no order


def damage(variety: Variety, output: Path) -> str:
    """What is wrong with an output as it lies there; empty if it is whole, unfinished or missing.

    Raises:
        UsageError: if its manifest is damaged.
    """
    if not output.exists():
        return ""
    if variety.stage in REPORTS:
        return "" if manifest.read(output) else "the report is empty"
    content = _manifest(output)
    if content is None:
        # A run may be resumed from a folder: whether it can is for the next run to say.
        return "" if variety.stage in RESUMED and output.is_dir() else "there is no manifest"
    folder = output if output.is_dir() else output.parent
    changed = files.changed(folder, content.get("outputs", []))
    return f"not as its manifest says: {', '.join(changed)}" if changed else ""


def is_whole(variety: Variety, output: Path) -> bool:
    """Whether it is there, finished, with the contents that its manifest says."""
    if not output.exists() or damage(variety, output):
        return False
    return variety.stage in REPORTS or (_manifest(output) or {}).get("complete", True)


def differences(variety: Variety, good: Path, output: Path) -> list[str]:
    """Names of files, values or tensors that differ between two whole outputs of one command."""
    if variety.stage in REPORTS:
        return _differing(*(_lasting(manifest.read(path)) for path in (good, output)))
    if output.is_file():
        return [] if hashing.describe(good) == hashing.describe(output) else [output.name]
    before, now = (
        {each["file"]: each for each in (_manifest(path) or {}).get("outputs", [])}
        for path in (good, output)
    )
    # How tensors lie in a checkpoint's files differs from save to save.
    found = [
        name
        for name in {**before, **now}
        if before.get(name) != now.get(name) and not name.endswith((".distcp", "/.metadata"))
    ]
    for name in {**before, **now}:
        if name.endswith("/.metadata"):
            part = Path(name).parent
            both = (_tensors(folder / part) for folder in (good, output))
            found += [f"{part}: {each}" for each in _differing(*both)]
    return sorted(found)


def _manifest(output: Path) -> dict[str, Any] | None:
    beside = output.with_name(f"{output.name}.{manifest.FILE}")
    return manifest.read(output if output.is_dir() else beside)


def _tensors(folder: Path) -> Any:
    """The content of a checkpoint in torch_dist format."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as scratch:
        dcp_to_torch_save(folder, f"{scratch}/content")
        return _lasting(torch.load(f"{scratch}/content", weights_only=False))


def _lasting(content: Any) -> Any:
    """Values without those of :data:`_RUN`, nested lists as dictionaries."""
    if isinstance(content, list | tuple):
        content = dict(enumerate(content))
    if isinstance(content, dict):
        return {key: _lasting(value) for key, value in content.items() if key not in _RUN}
    return content


def _differing(one: Any, other: Any, name: str = "") -> list[str]:
    import numpy
    import torch

    if isinstance(one, dict) and isinstance(other, dict):
        return [
            found
            for key in {**one, **other}
            for found in _differing(one.get(key), other.get(key), f"{name}/{key}")
        ]
    if _EXTRA in name or type(one) is not type(other):
        same = type(one) is type(other)
    elif isinstance(one, torch.Tensor):
        same = torch.equal(one, other)
    elif isinstance(one, numpy.ndarray):
        same = numpy.array_equal(one, other)
    elif isinstance(one, io.BytesIO):
        same = one.getvalue() == other.getvalue()
    else:
        same = one == other or (isinstance(one, float) and math.isnan(one) and math.isnan(other))
    return [] if same else [name]
