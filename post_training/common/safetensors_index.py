"""What a folder of safetensors holds, from the files' headers alone. No torch.

The headers are read by safetensors itself, which also compares them with the files' sizes. It does
not know which files belong together: the index, and what it promises, are checked here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from post_training.common import regular
from post_training.common.errors import UsageError
from post_training.common.files import read_json_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """One tensor: its file, safetensors' dtype name (``BF16``, ``F8_E4M3`` ...) and shape."""

    path: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size in the file; ``F4`` and ``F6`` are packed without gaps."""
        bits = re.search(r"\d+", self.dtype)
        return self.numel * (int(bits.group()) if bits else 8) // 8  # BOOL takes a byte


def read(folder: Path) -> dict[str, Entry]:
    """Every tensor of ``folder`` by name; each file's length is checked against its header.

    Raises:
        UsageError: if files are missing, truncated or not safetensors, or the index disagrees.
    """
    if regular.is_file(folder / INDEX):
        weight_map = read_json_object(folder / INDEX).get("weight_map", {})
        if not (isinstance(weight_map, dict) and weight_map) or not all(
            map(_is_inside, weight_map.values())
        ):
            raise UsageError(
                f"index {folder / INDEX}",
                "its weight_map is no object that gives a file of this folder for each tensor",
                "copy or download the model again",
            )
        files = sorted({folder / name for name in weight_map.values()})
        if regular.is_file(folder / SINGLE) and folder / SINGLE not in files:
            raise UsageError(
                f"model folder {folder}",
                f"it has {INDEX} and, besides its files, {SINGLE}, which transformers loads then",
                "delete those that do not belong to the model",
            )
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
        found = read_file(path)
        if twice := sorted(found.keys() & entries.keys()):
            remedy = "copy or download the model again"
            raise _damaged(path, f"it has {twice[0]}, and so has {entries[twice[0]].path}", remedy)
        entries.update(found)
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
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: Entry(path, each.get_dtype(), tuple(each.get_shape()))
                for name, each in slices.items()
            }
    except FileNotFoundError:
        raise _damaged(path, "it is missing, though the index names it") from None
    except (OSError, SafetensorError, MemoryError) as error:
        size = path.stat().st_size
        raise _damaged(
            path, f"its header cannot be read, or it is truncated ({size} bytes): {error}"
        ) from error


def _is_inside(name: object) -> bool:
    """Whether it names a file in the folder, which may be a link to elsewhere, as in a cache."""
    return isinstance(name, str) and not Path(name).is_absolute() and ".." not in Path(name).parts


def _damaged(path: Path, cause: str, remedy: str = "copy or download it again") -> UsageError:
    return UsageError(f"file {path}", cause, remedy)
