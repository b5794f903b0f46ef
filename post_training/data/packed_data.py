"""Packed training data, kept beside the checkpoints so that a resumed run reads the same data.

Every source of training data packs through :func:`prepare`: rank 0 reads and packs, unless an
earlier run did, and every rank maps the files. ``data.json`` in the folder says what they hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from post_training.common import files
from post_training.data import records
from post_training.data.packing import PackedConversations
from post_training.data.sources import TextSource

if TYPE_CHECKING:
    import numpy

_DESCRIPTION = "data.json"


class Packed(NamedTuple):
    """What was packed.

    Attributes:
        parts: name -> token ids int32 [n, s] and loss mask uint8 [n, s].
        description: for the log and the manifest.
        others: further JSON files to keep, by name.
    """

    parts: Mapping[str, tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]]
    description: dict[str, Any]
    others: Mapping[str, Any] = MappingProxyType({})


def fingerprint(source: TextSource, tokenizer: Any, length: int, rows: int) -> str:
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
    target: Path, pack: Callable[[], Packed], parts: Sequence[str]
) -> tuple[dict[str, PackedConversations], dict[str, Any]]:
    """Sequences by part, and their description; a collective call.

    Args:
        target: folder of the packed data; a file system that all ranks see.
        pack: reads and packs; called on rank 0 unless ``target`` is there.
        parts: those that ``pack`` makes.

    Raises:
        UsageError: on every rank, what ``pack`` raises.
    """
    from post_training.distributed import collectives

    def make() -> None:
        if not (target / _DESCRIPTION).is_file():
            _write(target, pack())

    collectives.on_first_rank(make)
    content = files.read_json_object(target / _DESCRIPTION, "packed data", "delete its folder")
    return {part: _mapped(target, part) for part in parts}, content


def _write(target: Path, packed: Packed) -> None:
    import numpy

    work = files.begin(target)
    for name, (ids, mask) in packed.parts.items():
        numpy.save(work / f"{name}_ids.npy", ids)
        numpy.save(work / f"{name}_mask.npy", mask)
    for name, content in {**packed.others, _DESCRIPTION: packed.description}.items():
        files.write_json(work / name, content)
    files.publish(target)


def _mapped(folder: Path, name: str) -> PackedConversations:
    """The packed sequences of one part."""
    import numpy

    ids, mask = (
        numpy.load(folder / f"{name}_{part}.npy", mmap_mode="r") for part in ("ids", "mask")
    )
    return PackedConversations(ids, mask)
