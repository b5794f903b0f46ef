"""Conversations to train a draft on: read, masked, packed into sequences, kept on disk.

The packed tokens lie beside the checkpoints, so that a run that goes on after an interruption reads
the very same data at once, and every rank reads only what it needs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import files
from post_training.common.errors import UsageError
from post_training.data import assistant_mask, document_formats, records
from post_training.data.document_formats import Document
from post_training.data.packing import PackedConversations, Packer

if TYPE_CHECKING:
    import numpy
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("post_training")

DATASET, FILES = "--finetune-hf-dataset", "--finetune-data-files"
PARTS = ("train", "valid", "test")
# Of a hundred conversations these are held out: one to evaluate on while training, one for later.
_HELD_OUT = {49: "valid", 99: "test"}
PROMPTS = "prompts.json"  # of held-out conversations, to measure acceptance on
_MOST_PROMPTS = 64
_CHECKED = 5_000  # rows that a check reads, well under a second


@dataclass(frozen=True)
class TextSource:
    """Where text or conversations to train on come from.

    Attributes:
        dataset: hub name, local file or folder; may be empty where there are files.
        files: local files, or files of the hub's data set.
        split: of the hub's data set.
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
        return ", ".join(path for path, _ in self.local) or self.dataset


def check(source: TextSource) -> None:
    """Check local data by its first rows: known fields, known roles, an answer in each. No torch.

    Raises:
        UsageError: naming file and line.
    """
    if not source.dataset and not source.files:
        raise UsageError(
            DATASET, "no data to train on is given", f"{DATASET} NAME_OR_PATH, or {FILES} FILE"
        )
    for path, option in source.local:
        count = 0
        for file in records.list_files(Path(path).expanduser(), option):
            for row in islice(records.read(file, option), _CHECKED - count):
                assistant_mask.require_answers(document_formats.document_of(row, option), option)
                count += 1
        if not count:
            raise UsageError(f"{option} {path}", "it holds no rows", "give a file with data")


def documents(source: TextSource) -> Iterator[tuple[Document, str]]:
    """Conversations with the option that named their source, as they are asked for."""
    from post_training.data import calibration_data

    if source.local:
        for path, option in source.local:
            yield from ((each, option) for each in calibration_data.read_documents(path, option))
        return
    if source.files:
        rows = records.hub_files(source.dataset, DATASET, source.files)
        yield from ((document_formats.document_of(row, DATASET), DATASET) for row in rows)
        return
    for row in records.hub_rows(source.dataset, DATASET, split=source.split):
        yield document_formats.document_of(row, DATASET), DATASET


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
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    rows: int,
    folder: Path,
    show_progress: bool = False,
) -> tuple[dict[str, PackedConversations], dict[str, Any]]:
    """Sequences by part (``PARTS``), and what is known about them; a collective call.

    Rank 0 reads and packs, unless ``folder`` has the result already; every rank maps the files.

    Args:
        source: of the conversations.
        tokenizer: of the target.
        length: of a sequence.
        rows: sequences that are needed; reading from the hub ends there.
        folder: where packed data is kept; a file system that all ranks see.
        show_progress: draw a bar.

    Raises:
        UsageError: on every rank, for data that cannot be trained on.
    """
    from post_training.distributed import collectives

    target = folder / fingerprint(source, tokenizer, length, rows)

    def make() -> None:
        if not (target / "data.json").is_file():
            _pack(source, tokenizer, length, rows, target, show_progress)

    collectives.on_first_rank(make)
    content = json.loads((target / "data.json").read_text(encoding="utf-8"))
    content["prompts"] = str(target / PROMPTS)
    return {part: mapped(target, part) for part in PARTS}, content


def _pack(
    source: TextSource,
    tokenizer: Any,
    length: int,
    rows: int,
    target: Path,
    show_progress: bool,
) -> None:
    import numpy
    from tqdm import tqdm

    packers = {part: Packer(length) for part in PARTS}
    train = packers["train"]
    conversations = answers = tokens = 0
    prompts: list[list[int]] = []
    with tqdm(total=rows, desc="packing", unit=" sequences", disable=not show_progress) as bar:
        for document, option in documents(source):
            found = assistant_mask.tokenize(document, tokenizer, option)
            before = len(train.full)
            part = _HELD_OUT.get(conversations % 100, "train")
            packers[part].add(found)
            if part == "valid" and len(prompts) < _MOST_PROMPTS and found.mask.index(True) > 0:
                prompts.append(found.ids[: min(found.mask.index(True), length)])
            conversations += 1
            tokens += len(found.ids)
            answers += sum(found.mask)
            bar.update(len(train.full) - before)
            # A data set on the hub may have millions of rows; local ones are read to their end, so
            # that the data does not depend on how long a run is.
            if len(train.full) >= rows and not source.local:
                break
    for packer in packers.values():
        packer.finish()
    if not train.full:
        raise UsageError(
            f"{DATASET} {source.describe()}",
            f"no answer lies within the first {length} tokens of any conversation"
            if conversations
            else "it holds no conversation",
            "raise --seq-length, or give conversations with shorter prompts",
        )
    work = files.begin(target)
    for name, packer in packers.items():
        ids, mask = packer.arrays()
        numpy.save(work / f"{name}_ids.npy", ids)
        numpy.save(work / f"{name}_mask.npy", mask)
    files.write_json(work / PROMPTS, prompts)
    files.write_json(
        work / "data.json",
        {
            "source": source.describe(),
            "conversations": conversations,
            "tokens": tokens,
            "answer_tokens": answers,
            "sequences": len(train.full),
            "held_out_sequences": len(packers["valid"].full),
            "sequence_length": length,
            "filled": round(sum(len(r[0]) for r in train.full) / (len(train.full) * length), 4),
            "cut": sum(packer.cut for packer in packers.values()),
            "left_out": sum(packer.dropped for packer in packers.values()),
        },
    )
    files.publish(target)


def mapped(folder: Path, name: str) -> PackedConversations:
    """The packed sequences ``train`` or ``valid`` of a folder that :func:`prepare` filled."""
    import numpy

    ids, mask = (
        numpy.load(folder / f"{name}_{part}.npy", mmap_mode="r") for part in ("ids", "mask")
    )
    return PackedConversations(ids, mask)


def describe(content: Mapping[str, Any]) -> str:
    """One line for the log."""
    text = (
        f"{content['sequences']:,} sequences x {content['sequence_length']:,} tokens from "
        f"{content['conversations']:,} conversations of {content['source']}; "
        f"{100 * content['answer_tokens'] / max(1, content['tokens']):.0f} % answer tokens, "
        f"{100 * content['filled']:.0f} % filled, {content['held_out_sequences']:,} held out"
    )
    if content["cut"]:
        text += f"; {content['cut']:,} conversations were longer and lost their end"
    if content["left_out"]:
        text += f"; {content['left_out']:,} left out: no answer within a sequence"
    return text


def print_masks(source: TextSource, tokenizer: Any, count: int) -> None:
    """Print the first conversations, answers marked, each under its place."""
    for document, option in islice(documents(source), count):
        tokens = assistant_mask.tokenize(document, tokenizer, option)
        print(f"-- {document.place}: {sum(tokens.mask)} of {len(tokens.ids)} tokens are answers")
        print(assistant_mask.show(tokens, tokenizer, sys.stdout.isatty()))


def frequencies(samples: Any, vocabulary: int) -> numpy.ndarray[Any, Any]:
    """How often each token is part of an answer in the training data: int64 [vocabulary]."""
    import numpy

    ids, mask = samples.tokens()
    return numpy.bincount(numpy.asarray(ids)[numpy.asarray(mask) > 0], minlength=vocabulary)
