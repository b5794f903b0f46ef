"""From a row of any known layout to a document: plain text or a conversation.

Layouts, the first that fits: ``messages`` (OpenAI form), ``conversations`` (ShareGPT's from/value,
or OpenAI form), an instruction with its answer, a text column, and question and answer under their
other usual names. Columns that go with a conversation or a pair are part of it: ``system``,
``tools``, ``history``, ``input`` and ``context``. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from post_training.common import inputs, json_text
from post_training.common.errors import UsageError, suggest
from post_training.data import records
from post_training.data.records import Row

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
# Alpaca's published rows have the whole prompt as text too.
_INSTRUCTION = ("instruction",)
# What a question is about; it follows the question after a blank line, as in Alpaca.
_SUBJECT_KEYS = ("input", "context")
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
    """A text, or a conversation (then ``text`` is empty), and where it comes from.

    ``unused`` are columns of the row that have a value and no part in the document.
    """

    place: str
    text: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    unused: tuple[str, ...] = ()


# Given a document and the option that named its source, raises UsageError.
Check = Callable[[Document, str], None]


def document_of(row: Row, option: str) -> Document:
    """Interpret ``row`` by the names of its columns; errors name ``option``.

    Raises:
        UsageError: no known column, an unknown role, or content that is not text.
    """
    values = {key: value for key, value in row.values.items() if value is not None}
    for key in CHAT_KEYS:
        if key in values:
            messages = _messages(values[key], row.place, option)
            return _conversation(row, values, option, [key], messages)
    question, answer = next(
        (pair for pair in PAIR_KEYS if all(isinstance(values.get(key), str) for key in pair)),
        ("", ""),
    )
    for key in TEXT_KEYS:
        if isinstance(values.get(key), str) and question not in _INSTRUCTION:
            rest = tuple(name for name in values if name != key)
            return Document(row.place, text=values[key], unused=rest)
    if question:
        asked, used = _asked(values, question)
        messages = (asked, {"role": "assistant", "content": values[answer]})
        return _conversation(row, values, option, [*used, answer], messages)
    raise UsageError(
        f"{option} {row.place}",
        f"no column of a known layout holds text; columns: {', '.join(values) or 'none'}",
        f"give a text column ({', '.join(TEXT_KEYS)}), a conversation ({', '.join(CHAT_KEYS)}), "
        f"or a pair such as {PAIR_KEYS[0][0]} and {PAIR_KEYS[0][1]}",
    )


def question_of(row: Row, option: str, key: str) -> Document:
    """The question of a row without an answer, in the column ``key``: a text, or several.

    Raises:
        UsageError: for a history or tools of another form.
    """
    values = {name: value for name, value in row.values.items() if value is not None}
    if isinstance(values[key], str):
        asked, used = _asked(values, key)
        return _conversation(row, values, option, used, (asked,))
    turns = tuple({"role": "user", "content": text} for text in values[key])
    return _conversation(row, values, option, [key], turns)


def _asked(values: Mapping[str, Any], question: str) -> tuple[dict[str, Any], list[str]]:
    """The user turn of a question and of what it is about, and the columns that it is made of."""
    about = [key for key in _SUBJECT_KEYS if key != question and isinstance(values.get(key), str)]
    text = "\n\n".join([values[question], *(values[key] for key in about if values[key])])
    return {"role": "user", "content": text}, [question, *about]


def _conversation(
    row: Row,
    values: Mapping[str, Any],
    option: str,
    used: Sequence[str],
    messages: tuple[dict[str, Any], ...],
) -> Document:
    """The document of these turns and of what goes with them in columns of its own."""
    tools, history = (_from_json(values.get(name)) or () for name in ("tools", "history"))
    if not isinstance(history, list | tuple) or not all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(isinstance(text, str) for text in pair)
        for pair in history
    ):
        raise UsageError(
            f"{option} {row.place}",
            "its history is no list of pairs of texts",
            'write it as [["question", "answer"], ...]',
        )
    if not isinstance(tools, list | tuple) or not all(isinstance(each, Mapping) for each in tools):
        raise UsageError(
            f"{option} {row.place}",
            "its tools are no list of objects",
            'write them as [{"type": "function", "function": {...}}, ...]',
        )
    earlier = [
        {"role": role, "content": text}
        for pair in history
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    known = {*used, "tools", "history"}
    own = int(messages[0]["role"] == "system")  # turns of the conversation before its history
    leading, system = [*messages[:own]], values.get("system")
    if isinstance(system, str) and (not own or system in ("", messages[0]["content"])):
        known.add("system")
        if system and not own:
            leading.append({"role": "system", "content": system})
    return Document(
        row.place,
        messages=(*leading, *earlier, *messages[own:]),
        tools=tuple(tools),
        unused=tuple(name for name in values if name not in known),
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
    name = _first(turn, "role", "from")
    name = name.lower() if isinstance(name, str) else name
    if not isinstance(name, str) or name not in ROLES:
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
    content = _first(turn, "content", "value")
    return {"role": ROLES[name], "content": _content(content, place, option), **message}


def _first(turn: Mapping[str, Any], *names: str) -> Any:
    """The first value that is not null: parquet fills the keys of the other layout with nulls."""
    return next((turn[name] for name in names if turn.get(name) is not None), None)


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
            return json_text.parse(value)
        except (ValueError, RecursionError):
            return value
    return value


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
        path = inputs.expanded(source)
        raise UsageError(f"{option} {path}", "it holds no rows", "give a file with data")
