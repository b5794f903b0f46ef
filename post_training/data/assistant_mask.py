"""Which tokens of a conversation are answers: the loss mask of answer-only training.

The tokens are those of the whole conversation rendered by the chat template, exactly as the model
sees them; ``answer_spans`` finds the answers in its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from post_training.common.errors import UsageError
from post_training.data import answer_spans
from post_training.data.document_formats import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tokens:
    """A conversation's token ids, and for each whether it belongs to an answer."""

    ids: list[int]
    mask: list[bool]


def tokenize(document: Document, tokenizer: PreTrainedTokenizerBase, option: str) -> Tokens:
    """Tokens and mask of a conversation.

    Raises:
        UsageError: for plain text, a conversation without an answer, one that the template refuses,
            or a template that puts no answer into its text.
    """
    require_answers(document, option)
    text, spans = answer_spans.find(document, tokenizer, option)
    special = not getattr(tokenizer, "chat_template", None)
    found = _tokens(text, spans, tokenizer, special=special)
    if not any(found.mask):
        raise UsageError(
            f"{option} {document.place}",
            "no token belongs to an answer: its loss mask is empty",
            "give each conversation an assistant turn with text",
        )
    return found


def require_answers(document: Document, option: str) -> None:
    """Raise UsageError unless an assistant turn of ``document`` has text."""
    if not document.messages:
        raise UsageError(
            f"{option} {document.place}",
            "it is plain text: no part of it is an answer to train on",
            'give conversations: {"messages": [{"role": "user", ...}, {"role": "assistant", ...}]}',
        )
    if not any(map(answer_spans.is_generated, document.messages)):
        roles = ", ".join(message["role"] for message in document.messages)
        raise UsageError(
            f"{option} {document.place}",
            f"its loss mask is empty: no assistant turn has text or calls (roles: {roles})",
            "give each conversation an answer; generate.sh lets the target write them",
        )


def show(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """The conversation as text, answers green or in brackets."""
    opening, closing = ("\x1b[32m", "\x1b[0m") if color else ("⟦", "⟧")
    parts: list[str] = []
    start = 0
    for i in range(1, len(tokens.ids) + 1):
        if i == len(tokens.ids) or tokens.mask[i] != tokens.mask[start]:
            piece = str(tokenizer.decode(tokens.ids[start:i], skip_special_tokens=False))
            parts.append(f"{opening}{piece}{closing}" if tokens.mask[start] else piece)
            start = i
    return "".join(parts)


def _tokens(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, special: bool) -> Tokens:
    """Tokens of ``text``; one that overlaps an answer belongs to it."""
    if not getattr(tokenizer, "is_fast", False):
        return _by_pieces(text, spans, tokenizer, special)
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    answered = bytearray(len(text))
    for start, end in spans:
        answered[start:end] = b"\1" * (end - start)
    mask = [any(answered[start:end]) for start, end in encoded["offset_mapping"]]
    return Tokens(list(encoded["input_ids"]), mask)


def _by_pieces(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, special: bool
) -> Tokens:
    """For tokenizers without offsets: prompts and answers tokenized apart, as engines do."""
    ids: list[int] = []
    mask: list[bool] = []
    position = 0
    for start, end in [*spans, (len(text), len(text))]:
        for piece, inside in ((text[position:start], False), (text[start:end], True)):
            if piece:
                first = special and not ids
                new = tokenizer(piece, add_special_tokens=first, verbose=False)["input_ids"]
                ids += new
                mask += [inside] * len(new)
        position = end
    return Tokens(ids, mask)
