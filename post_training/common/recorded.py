"""What a stage reads, against what its ``run.json`` recorded, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.common import files, manifest
from post_training.common.errors import UsageError

_WEIGHTS = (".distcp", ".safetensors")  # verified while they are loaded
_SMALL = 64 << 20  # bytes that are hashed within a tenth of a second


def require_recorded(folder: Path, content: Mapping[str, Any]) -> None:
    """Compare what lies beside the weights (configuration, tokenizer, index) with its hashes.

    Raises:
        UsageError: names a file that is not what was recorded.
    """
    small = [
        entry
        for entry in content.get("outputs", [])
        if not entry["file"].endswith(_WEIGHTS) and entry["bytes"] <= _SMALL
    ]
    if damaged := files.changed(folder, small):
        raise not_as_recorded(folder / damaged[0])


def not_as_recorded(path: Path) -> UsageError:
    """The error for a file that is missing, or whose hash is not the manifest's."""
    return UsageError(
        str(path),
        f"its content is not what {manifest.FILE} recorded when it was made",
        "copy or make it again; if you changed it on purpose, --no-verify loads it as it is",
    )
