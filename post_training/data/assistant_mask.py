"""Which tokens of a conversation are answers: the loss mask of answer-only training.

The tokens are those of the whole conversation through its chat template, exactly as the model sees
them. What the template says of itself (``{% generation %}``) is taken where it does. For any other
template the conversation is rendered a second time with a marker in place of each answer: what
stands around the markers is the template's own text, and what stands between it in the first
rendering are the answers, whatever the template did to them (stripped white space, removed
thoughts). The end-of-turn token after an answer is the model's too, and counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from post_training.common.errors import UsageError
from post_training.data import document_formats
from post_training.data.document_formats import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Letters that no template treats specially, unlikely in any text.
_MARKER = "zqAnswer{}Xqz"
_THINK, _END_THINK = "<think>", "</think>"
# Fields of a turn that the model writes.
_WRITTEN = ("reasoning_content", "content")


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
    if "{% generation" in _template(tokenizer) or "{%- generation" in _template(tokenizer):
        found = _by_template(document, tokenizer)
    else:
        text = document_formats.render(document, tokenizer, option)
        spans = answer_spans(document, text, tokenizer, option)
        special = not document_formats.has_template(tokenizer)
        found = _tokens(text, spans, tokenizer, special)
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
    if not any(_is_answer(message) for message in document.messages):
        roles = ", ".join(message["role"] for message in document.messages)
        raise UsageError(
            f"{option} {document.place}",
            f"its loss mask is empty: no assistant turn has text (roles: {roles})",
            "give each conversation an answer; generate.sh lets the target write them",
        )


def answer_spans(
    document: Document, text: str, tokenizer: PreTrainedTokenizerBase, option: str
) -> list[tuple[int, int]]:
    """Begin and end of each answer in ``text``, the rendered ``document``, in characters."""
    marked, count = [], 0
    thinking: dict[int, bool] = {}
    groups: list[list[int]] = []  # markers of one turn; what lies between them is the model's too
    for message in document.messages:
        changed = dict(message)
        if _is_answer(message):
            groups.append([])
            for name in _WRITTEN:
                if str(message.get(name) or "").strip():
                    # Templates treat an answer with thoughts differently: they stay in it.
                    changed[name] = _thoughts(str(message[name])) + _MARKER.format(count)
                    thinking[count] = bool(_thoughts(str(message[name])))
                    groups[-1].append(count)
                    count += 1
        marked.append(changed)
    outline = document_formats.render(replace(document, messages=tuple(marked)), tokenizer, option)
    present = [i for i in range(count) if _MARKER.format(i) in outline]
    originals = [
        str(message[name]).removeprefix(_thoughts(str(message[name])))
        for message in document.messages
        if _is_answer(message)
        for name in _WRITTEN
        if str(message.get(name) or "").strip()
    ]
    located = _locate(text, _split(outline, present), [originals[i] for i in present])
    if located is None:
        raise UsageError(
            f"{option} {document.place}",
            "the chat template writes its text differently for other answers, so that the answers "
            "cannot be told from it",
            "mark them in the template with {% generation %}",
        )
    spans = dict(zip(present, located, strict=True))
    joined: list[tuple[int, int]] = []
    for group in groups:
        found = [spans[i] for i in group if i in spans]
        if found:
            before = joined[-1][1] if joined else 0
            # Thoughts that the template kept belong to the answer.
            thought = text.rfind(_THINK, before, found[0][0]) if thinking[group[0]] else -1
            start = thought if thought >= 0 else found[0][0]
            joined.append((start, _with_end_token(text, found[-1][1], tokenizer)))
    return joined


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


def _thoughts(content: str) -> str:
    """What stands before the answer proper in a content with thoughts, tags included."""
    return content[: content.rfind(_END_THINK) + len(_END_THINK)] if _END_THINK in content else ""


def _is_answer(message: dict[str, Any]) -> bool:
    written = any(str(message.get(name) or "").strip() for name in _WRITTEN)
    return message["role"] == "assistant" and written


def _template(tokenizer: Any) -> str:
    return str(getattr(tokenizer, "chat_template", None) or "")


def _split(outline: str, present: Sequence[int]) -> list[str]:
    """The template's text before, between and after the markers of these numbers."""
    pieces = []
    for i in present:
        before, _, outline = outline.partition(_MARKER.format(i))
        pieces.append(before)
    return [*pieces, outline]


def _locate(
    text: str, pieces: Sequence[str], originals: Sequence[str]
) -> list[tuple[int, int]] | None:
    """Where each answer stands; None if the template's text is not where it should be."""
    if not text.startswith(pieces[0]):
        return None
    spans: list[tuple[int, int]] = []
    position = len(pieces[0])
    for i, (original, after) in enumerate(zip(originals, pieces[1:], strict=True)):
        start = position
        for written in (original, original.strip(), original.lstrip(), original.rstrip()):
            if text.startswith(written + after, start):
                end = start + len(written)
                break
        else:
            # Changed by the template: it ends where the template's text goes on.
            last = i == len(originals) - 1
            end = len(text) - len(after) if last else text.find(after, start)
            if end < start or not text.startswith(after, end):
                return None
        spans.append((start, end))
        position = end + len(after)
    return spans if position == len(text) else None


def _with_end_token(text: str, end: int, tokenizer: Any) -> int:
    """``end``, or the end of the special token that closes the turn there."""
    special = [str(token) for token in getattr(tokenizer, "all_special_tokens", [])]
    special += [str(token) for token in getattr(tokenizer, "added_tokens_encoder", {})]
    for token in sorted(set(special), key=len, reverse=True):
        if token and text.startswith(token, end):
            return end + len(token)
    return end


def _tokens(text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, special: bool) -> Tokens:
    """Tokens of ``text``; one that overlaps an answer belongs to it."""
    if not getattr(tokenizer, "is_fast", False):
        return _by_pieces(text, spans, tokenizer, special)
    encoded = tokenizer(
        text, add_special_tokens=special, return_offsets_mapping=True, verbose=False
    )
    mask, index = [], 0
    for start, end in encoded["offset_mapping"]:
        while index < len(spans) and spans[index][1] <= start:
            index += 1
        inside = index < len(spans) and end > spans[index][0] and end > start
        mask.append(inside)
    return Tokens(list(encoded["input_ids"]), mask)


def _by_pieces(
    text: str, spans: Sequence[tuple[int, int]], tokenizer: Any, special: bool
) -> Tokens:
    """For tokenizers that tell no offsets: prompts and answers apart, as an engine meets them."""
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


def _by_template(document: Document, tokenizer: Any) -> Tokens:
    encoded = tokenizer.apply_chat_template(
        list(document.messages),
        tools=list(document.tools) or None,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return Tokens(list(encoded["input_ids"]), [bool(each) for each in encoded["assistant_masks"]])
