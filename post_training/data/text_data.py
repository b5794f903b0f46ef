"""Text to distill on: documents and conversations as one stream of tokens, cut into sequences.

Every token counts, since the teacher has something to say after each; ``--answers-only`` takes the
conversations of :mod:`post_training.data.conversation_data`, in which the answers count. The
packed tokens lie beside the checkpoints, so that a resumed run reads the very same data at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.common import files
from post_training.common.errors import UsageError
from post_training.data import conversation_data
from post_training.data.conversation_data import TextSource
from post_training.data.packing import PackedConversations

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTION = conversation_data.DATASET
_HELD_OUT = 50  # every fiftieth sequence is held out
_TENTH = 10


def check(source: TextSource) -> None:
    """Check local data by its first rows. No torch.

    Raises:
        UsageError: naming file and line.
    """
    from post_training.data import document_formats

    if not source.dataset and not source.files:
        raise UsageError(
            OPTION,
            "no data to train on is given",
            f"{OPTION} NAME_OR_PATH, or {conversation_data.FILES}",
        )
    for path, option in source.local:
        document_formats.check(path, option)


def prepare(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    rows: int,
    folder: Path,
    show_progress: bool = False,
) -> tuple[dict[str, PackedConversations], dict[str, Any]]:
    """Sequences to train on and held-out ones, by these names, and what is known about them.

    A collective call.

    Args and result as :func:`conversation_data.prepare`; every token of the mask is 1.
    """
    from post_training.distributed import collectives

    target = folder / f"{conversation_data.fingerprint(source, tokenizer, length, rows)}-text"

    def make() -> None:
        if not (target / "data.json").is_file():
            _pack(source, tokenizer, length, rows, target, show_progress)

    collectives.on_first_rank(make)
    content = json.loads((target / "data.json").read_text(encoding="utf-8"))
    return {part: conversation_data.mapped(target, part) for part in ("train", "valid")}, content


def sequences(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[list[int]]:
    """Sequences of exactly ``length`` tokens; the end-of-text token stands between documents."""
    from post_training.data import calibration_data

    eos = tokenizer.eos_token_id
    held: list[int] = []
    for document, option in conversation_data.documents(source):
        if held and eos is not None and held[-1] != eos:
            held.append(eos)
        for piece in calibration_data.tokens(document, tokenizer, option):
            held += piece
            while len(held) >= length:
                yield held[:length]
                held = held[length:]


def _pack(
    source: TextSource, tokenizer: Any, length: int, rows: int, target: Path, show_progress: bool
) -> None:
    import numpy
    from tqdm import tqdm

    train: list[Any] = []
    valid: list[Any] = []
    with tqdm(total=rows, desc="packing", unit=" sequences", disable=not show_progress) as bar:
        for number, row in enumerate(sequences(source, tokenizer, length)):
            chosen = valid if number % _HELD_OUT == _HELD_OUT - 1 else train
            chosen.append(numpy.array(row, dtype=numpy.int32))
            bar.update(chosen is train)
            if len(train) >= rows:
                break
    if not valid and len(train) >= _TENTH:
        valid.append(train.pop())
    if not train:
        raise UsageError(
            f"{OPTION} {source.describe()}",
            f"it holds less text than one sequence of {length} tokens",
            "lower --seq-length, or give more text",
        )
    work = files.begin(target)
    for name, chosen in (("train", train), ("valid", valid)):
        ids = numpy.stack(chosen) if chosen else numpy.zeros((0, length), dtype=numpy.int32)
        numpy.save(work / f"{name}_ids.npy", ids)
        numpy.save(work / f"{name}_mask.npy", numpy.ones(ids.shape, dtype=numpy.uint8))
    files.write_json(
        work / "data.json",
        {
            "source": source.describe(),
            "sequences": len(train),
            "held_out_sequences": len(valid),
            "sequence_length": length,
            "tokens": (len(train) + len(valid)) * length,
        },
    )
    files.publish(target)


def describe(content: dict[str, Any]) -> str:
    """One line for the log."""
    if "conversations" in content:
        return conversation_data.describe(content)
    return (
        f"{content['sequences']:,} sequences x {content['sequence_length']:,} tokens of "
        f"{content['source']}; every token counts, {content['held_out_sequences']:,} held out"
    )
