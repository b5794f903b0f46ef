"""Where text comes from: local files, ModelOpt's presets, data sets on the hub. No torch.

Calibration reads documents of one source (:func:`read_documents`); training reads those of a
:class:`TextSource`, which may be several files.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from post_training.common import inputs
from post_training.common.errors import UsageError
from post_training.data import document_formats, records
from post_training.data.document_formats import Document, document_of
from post_training.data.records import Row

logger = logging.getLogger("post_training")

CALIBRATION = "--calib-dataset-path-or-name"
DATASET, FILES = "--finetune-hf-dataset", "--finetune-data-files"


@dataclass(frozen=True)
class TextSource:
    """Where text or conversations to train on come from.

    ``dataset`` is a name on the hub, a file or a folder, or empty if there are local ``files``;
    the files may also be those of the hub's data set. ``split`` is the hub's.
    """

    dataset: str
    files: tuple[str, ...] = ()
    split: str = "train"

    @property
    def local(self) -> list[tuple[str, str]]:
        """Local paths with the option that named each; empty for a data set on the hub."""
        if self.files and (not self.dataset or all(records.is_local(f) for f in self.files)):
            return [(path, FILES) for path in self.files]
        if self.dataset and records.is_local(self.dataset):
            return [(self.dataset, DATASET)]
        return []

    def describe(self) -> str:
        """For the log: the paths, or the name on the hub."""
        return ", ".join(path for path, _ in self.local) or self.dataset


def check(source: TextSource, also: document_formats.Check | None = None) -> None:
    """Check that ``source`` names something, and the first rows of local data.

    Args:
        also: a further check of each document, given the option that named its source.

    Raises:
        UsageError: naming file and line.
    """
    if not source.dataset and not source.files:
        raise UsageError(
            DATASET, "no data to train on is given", f"{DATASET} NAME_OR_PATH, or {FILES} FILE"
        )
    for path, option in source.local:
        document_formats.check(path, option, also)


def documents(source: TextSource) -> Iterator[tuple[Document, str]]:
    """Documents with the option that named their source, read lazily."""
    for path, option in source.local:
        yield from ((each, option) for each in read_documents(path, option))
    if not source.local:
        split = None if source.files else source.split
        rows = records.hub_rows(source.dataset, DATASET, files=source.files, split=split)
        yield from ((each, DATASET) for each in _interpreted(rows, DATASET))


def read_documents(source: str, option: str = CALIBRATION) -> Iterator[Document]:
    """Documents of ``source``, read lazily.

    The files of a folder, the splits of a preset and the members of a list take turns, so that a
    small sample has some of each.

    Args:
        source: a local file (:data:`records.SUFFIXES`) or a folder of such, a name that ModelOpt's
            presets know (``cnn_dailymail``, ``nvidia/Nemotron-...``), any other data set on the
            hub, or several names with commas between.
        option: the flag that named it, for errors.

    Raises:
        UsageError: nothing to read, malformed content, or a hub that cannot be reached.
    """
    if records.is_local(source):
        paths = records.list_files(inputs.expanded(source), option)
        return _take_turns([_interpreted(records.read(path, option), option) for path in paths])
    names = [name.strip() for name in source.split(",") if name.strip()]
    return _take_turns([stream for name in names for stream in _hub_streams(name, option)])


def _interpreted(rows: Iterator[Row], option: str) -> Iterator[Document]:
    """The rows' documents; at the end the log says which columns had no part in them."""
    unused: Counter[str] = Counter()
    try:
        for row in rows:
            document = document_of(row, option)
            unused.update(document.unused)
            yield document
    finally:
        if unused:
            found = ", ".join(f"{name} ({count:,} rows)" for name, count in unused.items())
            logger.info("%s: columns that are not used: %s", option, found)


def _hub_streams(name: str, option: str) -> list[Iterator[Document]]:
    """One stream for each split of a preset, or for the training split of another data set."""
    from modelopt.torch.utils import dataset_utils

    presets: dict[str, Any] = dataset_utils.SUPPORTED_DATASET_CONFIG
    if name in dataset_utils.DATASET_COMBOS:
        members = dataset_utils.DATASET_COMBOS[name]
        return [stream for member in members for stream in _hub_streams(member, option)]
    by_path = {preset["config"]["path"].lower(): preset for preset in presets.values()}
    preset = presets.get(name.lower()) or by_path.get(name.lower())
    if preset is None:
        return [_interpreted(records.hub_rows(name, option), option)]
    location = preset["config"]
    streams = []
    for split in location["split"]:
        rows = records.hub_rows(
            location["path"], option, configuration=location.get("name"), split=split
        )
        # ModelOpt knows its presets' columns; conversations still go through the chat template.
        chat = "chat_key" in preset
        streams.append(_interpreted(rows, option) if chat else _texts(rows, preset["preprocess"]))
    return streams


def _texts(rows: Iterator[Row], text_of: Callable[[dict[str, Any]], str]) -> Iterator[Document]:
    return (Document(row.place, text=text_of(row.values)) for row in rows)


def _take_turns(streams: list[Iterator[Document]]) -> Iterator[Document]:
    """One document from each stream in turn, until all have ended."""
    while streams:
        alive = []
        for stream in streams:
            for document in islice(stream, 1):
                yield document
                alive.append(stream)
        streams = alive
