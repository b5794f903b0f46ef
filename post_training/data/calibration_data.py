"""Calibration data: documents from any source, packed into full sequences of tokens.

Packing: documents are joined with the end-of-text token between them and the stream is cut into
pieces of exactly ``sequence_length`` tokens, so that no position is padding (padding cost 5.8 MMLU
points in pruning) and no document is cut by characters.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from post_training.common.errors import UsageError
from post_training.data import chat_templates, sources
from post_training.data.document_formats import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Long texts are tokenized in pieces of this many characters, cut at white space, so that memory and
# the time to the first token stay small, and reading stops when there are enough tokens.
_PIECE = 1 << 18


@dataclass(frozen=True)
class CalibrationData:
    """Packed sequences and what they were made of.

    Attributes:
        input_ids: int64 [n, s] on the CPU; every position is a token of a document or the
            end-of-text token after it.
        documents: documents of which at least one token is in ``input_ids``.
        tokens: tokens in ``input_ids``.
        source: the path or name as given.
        requested: sequences asked for; ``n`` is smaller if the data has less.
        notes: what a user should know, one sentence each.
        read: the files, as a manifest describes inputs.
    """

    input_ids: torch.Tensor
    documents: int
    tokens: int
    source: str
    requested: int
    notes: tuple[str, ...] = ()
    read: tuple[dict[str, Any], ...] = ()

    def describe(self) -> str:
        """One line for the log: what was really used."""
        count, length = self.input_ids.shape
        text = (
            f"{count:,} sequence{'' if count == 1 else 's'} x {length:,} tokens = "
            f"{self.tokens:,} tokens, from {self.documents:,} "
            f"document{'' if self.documents == 1 else 's'} of {self.source}"
        )
        return "; ".join((text, *self.notes))

    def batches(self, batch_size: int, rank: int = 0, size: int = 1) -> Iterator[torch.Tensor]:
        """Batches of one data-parallel rank, int64 [at most ``batch_size``, s], in order.

        Every sequence belongs to exactly one rank, and counts differ by at most one; with fewer
        sequences than ranks the last ranks get none.
        """
        yield from self.input_ids[rank::size].split(batch_size)


def load_calibration_data(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    calib_size: int,
    sequence_length: int,
    *,
    random_offset: bool = False,
    seed: int = 1234,
) -> CalibrationData:
    """Read ``source`` until ``calib_size`` sequences are full; deterministic.

    Args:
        source: as :func:`sources.read_documents` takes it.
        tokenizer: chat goes through its template.
        calib_size: number of sequences.
        sequence_length: tokens in each.
        random_offset: start each document at a random position (seeded), so that calibration
            does not see only beginnings.
        seed: of those positions.

    Raises:
        UsageError: nothing to read, malformed content, or a hub that cannot be reached.
    """
    generator = random.Random(seed) if random_offset else None
    needed, eos = calib_size * sequence_length, tokenizer.eos_token_id
    joined: list[int] = []
    starts: list[int] = []  # of documents in ``joined``
    has_chat = False
    for document in sources.read_documents(source):
        has_chat |= bool(document.messages)
        pieces = filter(None, tokens(document, tokenizer, sources.CALIBRATION, generator))
        for number, piece in enumerate(pieces):
            if number == 0:
                if joined and eos is not None and joined[-1] != eos:
                    joined.append(eos)
                starts.append(len(joined))
            joined += piece
            if len(joined) >= needed:
                break
        if len(joined) >= needed:
            break
    if not joined:
        raise UsageError(
            f"{sources.CALIBRATION} {source}",
            "it holds no text",
            "give a file with at least one document",
        )
    notes = []
    if len(joined) < needed:
        notes.append(f"{calib_size:,} sequences were asked for and the data ended before")
    if has_chat and not chat_templates.has_template(tokenizer):
        notes.append("the tokenizer has no chat template: turns are joined by blank lines")
    if eos is None:
        notes.append("the tokenizer has no end-of-text token: documents follow each other directly")
    full = min(len(joined) // sequence_length, calib_size)
    if full == 0:
        notes.append(f"the only sequence is shorter than {sequence_length:,} tokens")
    else:
        del joined[full * sequence_length :]
    input_ids = torch.tensor(joined, dtype=torch.long).view(max(1, full), -1)
    # Documents that lie entirely in the unused remainder do not count.
    documents = sum(start < len(joined) for start in starts)
    return CalibrationData(
        input_ids, documents, input_ids.numel(), source, calib_size, tuple(notes)
    )


def tokens(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    option: str,
    generator: random.Random | None = None,
) -> Iterator[list[int]]:
    """Token ids of one document in pieces; a conversation goes through the chat template.

    Args:
        document: a text or a conversation.
        tokenizer: of the model.
        option: the flag that named the data, for errors.
        generator: draws the position to start at; None starts at the beginning.
    """
    text = chat_templates.render(document, tokenizer, option)
    # A chat template writes the beginning-of-text token itself.
    special = not (document.messages and chat_templates.has_template(tokenizer))
    if generator is not None:
        text, special = _from_random_place(text, generator, special)
    if not text.strip():
        return
    start = 0
    while start < len(text):
        end = min(start + _PIECE, len(text))
        if end < len(text):
            # White space belongs to the next word, as in byte-level BPE.
            cut = max(text.rfind(" ", start + 1, end), text.rfind("\n", start + 1, end))
            end = cut if cut > start else end
        # verbose=False: no warning about documents longer than the model's context.
        encoded = tokenizer(
            text[start:end], add_special_tokens=special and start == 0, verbose=False
        )
        yield encoded["input_ids"]
        start = end


def _from_random_place(text: str, generator: random.Random, special: bool) -> tuple[str, bool]:
    """``text`` from a random word on; then without the beginning-of-text token."""
    start = generator.randrange(len(text)) if text else 0
    while 0 < start < len(text) and not text[start].isspace():
        start += 1
    return (text, special) if start in (0, len(text)) else (text[start:].lstrip(), False)
