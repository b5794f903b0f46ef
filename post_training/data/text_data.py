"""Text to distill on: documents and conversations as one stream of tokens, cut into sequences.

Every token counts, since the teacher predicts one after each; ``--answers-only`` takes the
conversations of :mod:`post_training.data.conversation_data`, in which only the answers count.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from post_training.common.errors import UsageError
from post_training.data import conversation_data, packing, sources
from post_training.data.packing import PackedConversations
from post_training.data.sources import DATASET, TextSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PARTS = ("train", "valid")
_HELD_OUT = 50  # every fiftieth sequence is held out
_TENTH = 10


def check(source: TextSource) -> None:
    """Check the first rows of local data; errors name file and line. No torch."""
    sources.check(source)


def prepare(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    rows: int,
    folder: Path,
    show_progress: bool = False,
) -> tuple[dict[str, PackedConversations], dict[str, Any]]:
    """Sequences to train on and held-out ones, and what is known about them; a collective call.

    Args and result as :func:`conversation_data.prepare`; every token of the mask is 1.
    """
    parts, content = packing.prepare(
        folder,
        source,
        lambda: f"{packing.fingerprint(source, tokenizer, length, rows)}-text",
        lambda: _pack(source, tokenizer, length, rows, show_progress),
        PARTS,
    )
    del content["folder"]
    return parts, content


def _sequences(
    source: TextSource, tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[list[int]]:
    """Sequences of exactly ``length`` tokens, the end-of-text token between documents."""
    from post_training.data import calibration_data

    eos = tokenizer.eos_token_id
    held: list[int] = []
    for document, option in sources.documents(source):
        if held and eos is not None and held[-1] != eos:
            held.append(eos)
        for piece in calibration_data.tokens(document, tokenizer, option):
            held += piece
            while len(held) >= length:
                yield held[:length]
                held = held[length:]


def _pack(
    source: TextSource, tokenizer: Any, length: int, rows: int, show_progress: bool
) -> packing.Packed:
    import numpy

    train: list[Any] = []
    valid: list[Any] = []
    with tqdm(total=rows, desc="packing", unit=" sequences", disable=not show_progress) as bar:
        for number, row in enumerate(_sequences(source, tokenizer, length)):
            chosen = valid if number % _HELD_OUT == _HELD_OUT - 1 else train
            chosen.append(numpy.array(row, dtype=numpy.int32))
            bar.update(chosen is train)
            if len(train) >= rows:
                break
    if not valid and len(train) >= _TENTH:
        valid.append(train.pop())
    if not train:
        raise UsageError(
            f"{DATASET} {source.describe()}",
            f"it holds less text than one sequence of {length} tokens",
            "lower --seq-length, or give more text",
        )
    parts = {}
    for name, chosen in zip(PARTS, (train, valid), strict=True):
        ids = numpy.stack(chosen) if chosen else numpy.zeros((0, length), dtype=numpy.int32)
        parts[name] = ids, numpy.ones(ids.shape, dtype=numpy.uint8)
    description = {
        "source": source.describe(),
        "sequences": len(train),
        "held_out_sequences": len(valid),
        "sequence_length": length,
        "tokens": (len(train) + len(valid)) * length,
    }
    return parts, description, {}


def describe(content: dict[str, Any]) -> str:
    """One line for the log."""
    if "conversations" in content:
        return conversation_data.describe(content)
    return (
        f"{content['sequences']:,} sequences x {content['sequence_length']:,} tokens of "
        f"{content['source']}; every token counts, {content['held_out_sequences']:,} held out"
    )
