"""What a folder of safetensors holds, from the files' headers alone. No torch, no safetensors."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from post_training.common.errors import UsageError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_MAX_HEADER = 100_000_000  # the format's own limit, in bytes


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, safetensors' dtype name (``BF16``, ``F8_E4M3`` ...) and shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    bytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read(folder: Path) -> dict[str, Entry]:
    """Every tensor of ``folder`` by name; each file's length is checked against its header.

    Raises:
        UsageError: if files are missing, truncated or not safetensors, or the index disagrees.
    """
    if (folder / INDEX).is_file():
        weight_map = _json(folder / INDEX).get("weight_map", {})
        files = sorted({folder / name for name in weight_map.values()})
    elif (folder / SINGLE).is_file():
        weight_map, files = None, [folder / SINGLE]
    else:
        raise UsageError(
            f"model folder {folder}",
            f"it has neither {SINGLE} nor {INDEX}",
            "name a folder with safetensors weights",
        )
    entries: dict[str, Entry] = {}
    for path in files:
        entries.update(read_file(path))
    absent = sorted(set(weight_map or ()) - set(entries))
    if absent:
        raise UsageError(
            f"index {folder / INDEX}",
            f"it names {len(absent)} tensors that its files lack, e.g. {absent[0]}",
            "copy or download the model again",
        )
    return entries


def read_file(path: Path) -> dict[str, Entry]:
    """Every tensor of one safetensors file by name.

    Raises:
        UsageError: if the file is missing, truncated or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER + 1
            if length > min(_MAX_HEADER, size):
                raise _damaged(path, f"its {size} bytes do not hold the header")
            header: dict[str, Any] = json.loads(stream.read(length))
    except FileNotFoundError:
        raise _damaged(path, "it is missing, though the index names it") from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"its header cannot be read: {error}") from error
    header.pop("__metadata__", None)
    entries = {}
    for name, tensor in header.items():
        begin, end = tensor["data_offsets"]
        if 8 + length + end > size:
            raise _damaged(
                path, f"it has {size} bytes, and {name} ends at byte {8 + length + end}: truncated"
            )
        entries[name] = Entry(path, tensor["dtype"], tuple(tensor["shape"]), end - begin)
    return entries


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, f"it cannot be read as JSON: {error}") from error


def _damaged(path: Path, cause: str) -> UsageError:
    return UsageError(f"file {path}", cause, "copy or download it again")
