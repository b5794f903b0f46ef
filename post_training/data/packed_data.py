"""Packed training data, kept beside the checkpoints so that a resumed run reads the same data.

Every source of training data packs through :func:`prepare`: rank 0 reads and packs, unless an
earlier run did, and every rank maps the files. ``data.json`` in the folder says what they hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import files
from post_training.data import records
from post_training.data.packing import PackedConversations
from post_training.data.sources import TrainingText

if TYPE_CHECKING:
    import numpy

_DESCRIPTION = "data.json"


def fingerprint(source: TrainingText, tokenizer: Any, length: int, rows: int) -> str:
    """Hash of everything that decides the packed sequences."""
    entries: list[Any] = [source.dataset, source.files, source.split, length]
    entries.append(None if source.local else rows)
    for path, option in source.local:
        for file in records.list_files(Path(path).expanduser(), option):
            status = file.stat()
            entries.append([str(file), status.st_size, status.st_mtime_ns])
    entries.append(str(getattr(tokenizer, "chat_template", None)))
    entries.append([len(tokenizer), tokenizer("Hello, world! 12345")["input_ids"]])
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()[:16]


def prepare(
    target: Path, parts: Sequence[str], pack: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, PackedConversations], dict[str, Any]]:
    """Sequences by part, and what is known about them; a collective call.

    Args:
        target: folder of the packed data; a file system that all ranks see.
        parts: their names.
        pack: fills the folder that it is given with :func:`save_part` for each part, and returns
            the description; called on rank 0 unless ``target`` is complete.

    Raises:
        UsageError: on every rank, what ``pack`` raises.
    """
    from post_training.data import calibration_data

    def make() -> None:
        if not (target / _DESCRIPTION).is_file():
            work = files.begin(target)
            files.write_json(work / _DESCRIPTION, pack(work))
            files.publish(target)

    calibration_data.on_first_rank(make)
    content = files.read_json_object(target / _DESCRIPTION, "packed data", "delete its folder")
    return {part: _mapped(target, part) for part in parts}, content


def save_part(
    folder: Path, name: str, ids: numpy.ndarray[Any, Any], mask: numpy.ndarray[Any, Any]
) -> None:
    """Write the part ``name``: token ids int32 [n, s] and loss mask uint8 [n, s]."""
    import numpy

    numpy.save(folder / f"{name}_ids.npy", ids)
    numpy.save(folder / f"{name}_mask.npy", mask)


def _mapped(folder: Path, name: str) -> PackedConversations:
    """The packed sequences of one part."""
    import numpy

    ids, mask = (
        numpy.load(folder / f"{name}_{part}.npy", mmap_mode="r") for part in ("ids", "mask")
    )
    return PackedConversations(ids, mask)
