"""What ``--overwrite`` may replace: a stage's output, and nothing that somebody else put there.

A folder that is written at once holds what its manifest lists. That of a training run or of an
extraction of features grows: it holds files of known names besides. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from post_training.common import manifest
from post_training.common.errors import UsageError

# Paths in the folder of a run, finished or not; * is any number of folders too.
_TRAINING = (
    *("iter_[0-9]*/*", "release/*", "huggingface/*", "huggingface.incomplete/*"),
    *("latest_checkpointed_iteration.txt", "training/metrics.jsonl", "training/curves.png"),
    *("training/tensorboard/*", ".*.previous/*"),
    *(f"training/data/[0-9a-f]*/*{suffix}" for suffix in (".npy", ".json")),
)
_FEATURES = (
    *("settings.json", "prompts.json", ".data/*"),
    *(f"{part}/shard-*.safetensors" for part in ("train", "valid", "test")),
)
_GROWING = {
    **dict.fromkeys(("distill", "finetune", "eagle3"), _TRAINING),
    "extract_features": _FEATURES,
}
# Locks, what a killed run wrote last, and what NFS keeps of a file that is open.
_LEFT_OVER = re.compile(r"\.(lock|nfs\w+|.+\.(\d+|incomplete))")


def require_own(folder: Path, made_by: Sequence[str], *, begun: bool = False) -> None:
    """Raise UsageError unless --overwrite may replace a folder: an output of these stages.

    Args:
        begun: whether a run of theirs has begun there that has no manifest yet.
    """
    content = manifest.read(folder) or {}
    found = content.get("stage")
    if found not in made_by and (found or not begun):
        if any(folder.iterdir()):
            what = f"the output of {found}" if found else "something else"
            raise UsageError(
                f"--overwrite, output folder {folder}",
                f"it holds {what}, and not what this stage makes",
                "name another folder; if nobody needs it, delete it yourself",
            )
        return
    known = {folder / each["file"] for each in content.get("outputs", [])}
    patterns = [each for stage in ([found] if found else made_by) for each in _grown(stage)]
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        is_own = path in known or name == Path(manifest.FILE) or _LEFT_OVER.fullmatch(name.name)
        if path.is_dir() and not path.is_symlink():
            continue
        if not is_own and not any(fnmatchcase(name.as_posix(), each) for each in patterns):
            raise UsageError(
                f"--overwrite, output folder {folder}",
                f"it holds more than the stage's output: {name}",
                "move that elsewhere, or delete the folder yourself",
            )


def _grown(stage: str) -> tuple[str, ...]:
    return _GROWING.get(stage, ())
