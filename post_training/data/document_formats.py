"""From a row of any known layout to a document: plain text or a conversation.

Layouts, the first that fits: ``messages`` (OpenAI form), ``conversations`` (ShareGPT's from/value,
or OpenAI form), question and answer under their usual names, and a text column. Nothing here
imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from post_training.common.errors import UsageError, suggest
from post_training.data import records
from post_training.data.records import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_CHECKED = 20_000  # about a second of JSONL; later rows are checked when they are read
TEXT_KEYS = ("text", "article", "content", "document")
CHAT_KEYS = ("messages", "conversations", "conversation")
PAIR_KEYS = (
    ("question", "answer"),
    ("question", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("input", "output"),
    ("problem", "generated_solution"),
)
# ShareGPT's names on the left, chat templates' on the right.
ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Document:
    """A text, or a conversation (then ``text`` is empty), and where it comes from."""

    place: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()


# Given a document and the option that named its source, raises UsageError.
Check = Callable[[Document, str], None]


def document_of(row: Row, option: str) -> Document:
    """Interpret ``row`` by the names of its columns; errors name ``option``.

    Raises:
        UsageError: no known column, an unknown role, or content that is not text.
    """
    values = row.values
    for key in CHAT_KEYS:
        if values.get(key) is not None:
            tools = _from_json(values.get("tools")) or ()
            return Document(
                row.place, messages=_messages(values[key], row.place, option), tools=tuple(tools)
            )
    for key in TEXT_KEYS:
        if isinstance(values.get(key), str):
            return Document(row.place, text=values[key])
    for question, answer in PAIR_KEYS:
        if isinstance(values.get(question), str) and isinstance(values.get(answer), str):
            asked = values[question]
            # Alpaca's layout: the instruction, a blank line, what it applies to.
            if question == "instruction" and values.get("input"):
                asked = f"{asked}\n\n{values['input']}"
            return Document(
                row.place,
                messages=(
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": values[answer]},
                ),
            )
    raise UsageError(
        f"{option} {row.place}",
        f"no column of a known layout holds text; columns: {', '.join(values) or 'none'}",
        f"give a text column ({', '.join(TEXT_KEYS)}), a conversation ({', '.join(CHAT_KEYS)}), "
        f"or a pair such as {PAIR_KEYS[0][0]} and {PAIR_KEYS[0][1]}",
    )


def _messages(turns: Any, place: str, option: str) -> tuple[dict[str, Any], ...]:
    turns = _from_json(turns)
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UsageError(
            f"{option} {place}",
            f"the conversation is a {type(turns).__name__}, not a list of objects",
            'write it as [{"role": "user", "content": "..."}, ...]',
        )
    if not turns:
        raise UsageError(f"{option} {place}", "the conversation is empty", "remove the record")
    return tuple(_message(turn, place, option) for turn in turns)


def _message(turn: Mapping[str, Any], place: str, option: str) -> dict[str, Any]:
    name = turn.get("role", turn.get("from"))
    name = name.lower() if isinstance(name, str) else name
    if name not in ROLES:
        hint = suggest(str(name), list(ROLES))
        raise UsageError(
            f"{option} {place}",
            f"unknown role {name!r} in a turn with the keys {', '.join(turn)}",
            f"use one of {', '.join(ROLES)}. {hint}".rstrip(),
        )
    # Tool calls, reasoning and names go to the chat template unchanged. Parquet fills the columns
    # that a row lacks with nulls, which templates would take for values.
    message = {
        key: value
        for key, value in turn.items()
        if key not in ("role", "from", "content", "value") and value is not None
    }
    content = turn.get("content", turn.get("value"))
    return {"role": ROLES[name], "content": _content(content, place, option), **message}


def _content(content: Any, place: str, option: str) -> str:
    """Text of a turn: a string, nothing (a tool call), or OpenAI's list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise UsageError(
        f"{option} {place}",
        f"a turn's content is a {type(content).__name__} that is not text",
        'write the content as a string or as [{"type": "text", "text": "..."}]',
    )


def _from_json(value: Any) -> Any:
    """Some data sets store lists of objects as JSON text, because parquet has fixed columns."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def render(
    document: Document,
    tokenizer: PreTrainedTokenizerBase,
    option: str,
    *,
    ask: bool = False,
    template_options: Mapping[str, Any] | None = None,
) -> str:
    """Text of ``document``: a conversation through the tokenizer's chat template.

    Without a template the turns' contents are joined by blank lines; callers say so to the user
    (:func:`has_template`).

    Args:
        ask: append the generation prompt, so that the model continues with its answer.
        template_options: further variables of the template, such as Qwen3's ``enable_thinking``.

    Raises:
        UsageError: if the template refuses the conversation (such as a system turn).
    """
    if not document.messages:
        return document.text
    if not has_template(tokenizer):
        return "\n\n".join(turn["content"] for turn in document.messages)

    try:
        rendered = tokenizer.apply_chat_template(
            list(document.messages),
            tools=list(document.tools) or None,
            tokenize=False,
            add_generation_prompt=ask,
            **(template_options or {}),
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        roles = ", ".join(turn["role"] for turn in document.messages)
        raise UsageError(
            f"{option} {document.place}",
            f"the tokenizer's chat template refuses the roles {roles}: {error}",
            "change the conversation to what the template accepts, or give plain text",
        ) from error
    return str(rendered)


def has_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def check(source: str, option: str, also: Check | None = None) -> None:
    """Check the first rows of local data: JSONL, parquet, CSV or text. Hub names pass.

    Args:
        also: a further check of each document.

    Raises:
        UsageError: if it is missing, empty, malformed, or its rows lack the known fields.
    """
    if not records.is_local(source):
        return
    empty = True
    for row in islice(records.local_rows(source, option), _ROWS_CHECKED):
        empty = False
        document = document_of(row, option)
        if also is not None:
            also(document, option)
    if empty:
        path = Path(source).expanduser()
        raise UsageError(f"{option} {path}", "it holds no rows", "give a file with data")
