"""Training sequences: whole conversations packed into one length, and kept beside the checkpoints.

The rest of a sequence is padding with a loss mask of 0. A conversation longer than a sequence is
truncated. Conversations in one sequence attend to each other, as in Megatron-LM's packing.

Every source of training data packs through :func:`prepare`: rank 0 reads and packs, unless an
earlier run did, and every rank maps the files, so that a resumed run reads the same data.
No torch before that.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from post_training.common import files, forms, hashing, inputs
from post_training.common.errors import UsageError
from post_training.data import provenance, records
from post_training.data.assistant_mask import Tokens
from post_training.data.sources import DATASET, TextSource

if TYPE_CHECKING:
    import numpy
    import torch

    # Token ids int32 [n, s], and a mask uint8 [n, s] that is 1 where a token counts in the loss.
    type Arrays = tuple[numpy.ndarray[Any, Any], numpy.ndarray[Any, Any]]
    # Sequences by part, their description, and further JSON files to keep, by name.
    type Packed = tuple[Mapping[str, Arrays], dict[str, Any], dict[str, Any]]

PAD = 0
_OPEN = 64  # sequences that are filled at the same time
_DESCRIPTION = "data.json"
_FILES = "files"  # in the description: those beside it, with their hashes
_FORMAT = 4  # of the folder; what another version kept is read and packed again

logger = logging.getLogger("post_training")


class _Kept(TypedDict):
    files: list[dict[str, Any]]
    read: list[dict[str, Any]]
    packed: str


class Packer:
    """Fills sequences of ``length`` tokens with whole conversations."""

    def __init__(self, length: int) -> None:
        self.length = length
        self.full: list[Tokens] = []
        self.cut = 0
        self.dropped = 0
        self._open: list[Tokens] = []

    def add(self, tokens: Tokens) -> None:
        """Put a conversation into the fullest open sequence that has room for it."""
        if len(tokens.ids) > self.length:
            self.cut += 1
        ids, mask = tokens.ids[: self.length], tokens.mask[: self.length]
        if not any(mask[2:]):  # no position predicts the first two tokens
            self.dropped += 1
            return
        fitting = [row for row in self._open if len(row.ids) + len(ids) <= self.length]
        if fitting:
            row = max(fitting, key=lambda each: len(each.ids))
        else:
            row = Tokens([], [])
            self._open.append(row)
        row.ids.extend(ids)
        row.mask.extend(mask)
        if len(row.ids) == self.length:
            self._close(row)
        elif len(self._open) > _OPEN:
            self._close(max(self._open, key=lambda each: len(each.ids)))

    def _close(self, row: Tokens) -> None:
        self._open = [each for each in self._open if each is not row]
        self.full.append(row)

    def finish(self) -> None:
        """Close all open sequences."""
        self.full += self._open
        self._open = []

    def arrays(self) -> Arrays:
        """The full sequences, padded at the end."""
        import numpy

        ids = numpy.full((len(self.full), self.length), PAD, dtype=numpy.int32)
        mask = numpy.zeros((len(self.full), self.length), dtype=numpy.uint8)
        for i, row in enumerate(self.full):
            ids[i, : len(row.ids)] = row.ids
            mask[i, : len(row.mask)] = row.mask
        return ids, mask


@dataclass(frozen=True)
class PackedConversations:
    """Packed sequences in memory-mapped files; the :class:`Samples` of online training.

    Attributes:
        ids: int32 [n, s].
        mask: uint8 [n, s], 1 where a token is an answer's.
    """

    ids: numpy.ndarray[Any, Any]
    mask: numpy.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> Mapping[str, torch.Tensor]:
        """``input_ids`` int64 [b, s] and ``loss_mask`` uint8 [b, s]."""
        import torch

        chosen = list(indices)
        return {
            "input_ids": torch.from_numpy(self.ids[chosen].astype("int64")),
            "loss_mask": torch.from_numpy(self.mask[chosen].copy()),
        }

    def tokens(self) -> Arrays:
        """All token ids and masks, [n, s] each."""
        return self.ids, self.mask


def fingerprint(source: TextSource, tokenizer: Any, length: int, rows: int) -> str:
    """Hash of everything that decides the packed sequences: the content of files, not their times.

    For the first rank: it reads all local data, at the speed of the disk.
    """
    entries: list[Any] = [_FORMAT, source.dataset, source.files, source.split, length]
    entries.append(None if source.local else rows)
    for path, option in source.local:
        for file in records.list_files(inputs.expanded(path), option):
            entries.append([str(file), hashing.digest(file, "xxh3_128")])
    entries.append(str(getattr(tokenizer, "chat_template", None)))
    fast = getattr(tokenizer, "backend_tokenizer", None)  # None for one in Python
    entries.append(fast.to_str() if fast else sorted(tokenizer.get_vocab().items()))
    entries.append([str(tokenizer.special_tokens_map), len(tokenizer), tokenizer("Hello, 1 2")])
    return hashlib.sha256(json.dumps(entries, default=dict).encode()).hexdigest()[:16]


def prepare(
    folder: Path,
    source: TextSource,
    identify: Callable[[], str],
    pack: Callable[[], Packed],
    parts: Sequence[str],
) -> tuple[dict[str, PackedConversations], dict[str, Any]]:
    """Sequences by part, and their description; a collective call.

    Args:
        folder: of packed data; a file system that all ranks see.
        source: what is packed; the description has it as ``read``, inputs of a manifest.
        identify: names what is packed, by a fingerprint; called on rank 0.
        pack: reads and packs; called on rank 0 unless that is there, undamaged.
        parts: those that ``pack`` makes.

    Raises:
        UsageError: on every rank, what ``pack`` raises.
    """
    import numpy

    from post_training.distributed import collectives

    def make() -> Path:
        name = identify()
        target = folder / name
        if (target / _DESCRIPTION).is_file():
            if _is_whole(target):
                return target
            logger.warning("packed data %s is damaged: the data is packed again", target)
        places = source.local or [(source.dataset, DATASET)]
        with provenance.reading("data", places) as read:
            packed, description, others = pack()
        if identify() != name:  # by whoever changed it before it was read
            raise provenance.replaced(source.describe())
        work = files.begin(target)
        for part, (ids, mask) in packed.items():
            numpy.save(work / f"{part}_ids.npy", ids)
            numpy.save(work / f"{part}_mask.npy", mask)
        for file, content in others.items():
            files.write_json(work / file, content)
        described = {**description, "read": read, "packed": name}
        files.write_json(work / _DESCRIPTION, {**described, _FILES: files.describe_tree(work)})
        files.publish(target)
        return target

    def mapped(name: str) -> numpy.ndarray[Any, Any]:
        found: numpy.ndarray[Any, Any] = numpy.load(target / f"{name}.npy", mmap_mode="r")
        return found

    target = collectives.on_first_rank(make)
    content = files.read_json_object(target / _DESCRIPTION, "packed data", "delete its folder")
    del content[_FILES]
    sequences = {
        part: PackedConversations(mapped(f"{part}_ids"), mapped(f"{part}_mask")) for part in parts
    }
    return sequences, {**content, "folder": str(target)}


def _is_whole(target: Path) -> bool:
    """Whether packed data is what was packed, by the hashes in its description."""
    try:
        content = files.read_json_object(target / _DESCRIPTION)
        described = forms.parse(content, _Kept, str(target), "")[_FILES]
        return bool(described) and not files.changed(target, described)
    except UsageError:
        return False
