"""Prompts for a model to answer, from files or the hub. No torch.

Layouts, the first that fits: a conversation (``messages``, ``conversations``), MT-Bench's questions
(``turns``, or a list under ``prompt``), one question (``prompt``, ``question``, ...), a pair of
question and answer, and text. The answers of a conversation are dropped: the model generates its
own. A ``.txt`` file has one prompt per line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from post_training.common import inputs
from post_training.common.errors import UsageError
from post_training.data import document_formats, records
from post_training.data.document_formats import Document
from post_training.data.records import Row

ID_KEYS = ("id", "question_id", "prompt_id", "uuid", "conversation_id")
QUESTION_KEYS = ("prompt", "question", "instruction", "problem", "input")
TOOL_TURNS = "with tool turns, which depend on the answers they replied to"
NOTHING_ASKED = "without a user turn"


@dataclass(frozen=True)
class Dialogue:
    """User turns to answer, one after the other.

    Attributes:
        number: of the row in its source, from 0.
        id: the row's own identifier, else ``number``.
        messages: system and user turns in order; each user turn is answered before the next.
        tools: tool definitions for the chat template.
        category: the row's own, such as MT-Bench's.
        place: of the row, for errors.
        unused: columns of the row that have a value and no part in the dialogue.
    """

    number: int
    id: str | int
    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] = ()
    category: str | None = None
    place: str = ""
    unused: tuple[str, ...] = ()

    @property
    def questions(self) -> int:
        """Number of user turns."""
        return sum(message["role"] == "user" for message in self.messages)

    def size(self, answer_tokens: int) -> int:
        """Bytes of its answered row at the most: four characters a token."""
        return len(str(self.messages)) + 4 * answer_tokens * self.questions

    def first_turn(self) -> Dialogue:
        """The same, up to the first user turn."""
        roles = [message["role"] for message in self.messages]
        return replace(self, messages=self.messages[: roles.index("user") + 1])


@dataclass(frozen=True)
class Prompts:
    """The dialogues of a source, and how many rows were skipped for which reason."""

    source: str
    dialogues: list[Dialogue]
    left_out: Counter[str] = field(default_factory=Counter)

    def size(self, answer_tokens: int) -> int:
        """Bytes of the answered rows at the most, with answers of so many tokens."""
        return sum(dialogue.size(answer_tokens) for dialogue in self.dialogues)

    def describe(self) -> str:
        """One line for the log."""
        questions = sum(dialogue.questions for dialogue in self.dialogues)
        text = f"{len(self.dialogues):,} prompts, {questions:,} user turns, from {self.source}"
        for reason, count in self.left_out.items():
            text += f"; left out: {count:,} {reason}"
        unused = Counter(key for dialogue in self.dialogues for key in dialogue.unused)
        if unused:
            columns = (f"{name} ({count:,} rows)" for name, count in unused.items())
            text += f"; columns that are not used: {', '.join(columns)}"
        return text


def load(
    source: str, option: str, *, limit: int | None = None, split: str | None = None
) -> Prompts:
    """Read ``source`` to its end, or to ``limit`` rows.

    Args:
        source: a file, a folder of files, or a data set on the hub.
        option: the flag that named it, for errors.
        limit: use the first rows only.
        split: of a data set on the hub; by default ``train``, else its first.

    Raises:
        UsageError: nothing to read, malformed content, or a hub that cannot be reached.
    """
    dialogues: list[Dialogue] = []
    left_out: Counter[str] = Counter()
    for number, row in enumerate(islice(_rows(source, option, split), limit)):
        found = _dialogue(row, number, option)
        if isinstance(found, str):
            left_out[found] += 1
        else:
            dialogues.append(found)
    if not dialogues:
        reasons = "; ".join(f"{count} rows {reason}" for reason, count in left_out.items())
        raise UsageError(
            f"{option} {source}",
            f"it holds no prompt{': ' + reasons if reasons else ''}",
            "give questions or conversations, such as "
            '{"messages": [{"role": "user", "content": "..."}]}',
        )
    return Prompts(source, dialogues, left_out)


def _rows(source: str, option: str, split: str | None) -> Iterator[Row]:
    if not records.is_local(source):
        yield from records.hub_rows(source, option, split=split)
        return
    for path in records.list_files(inputs.expanded(source), option):
        for row in records.read(path, option):
            if path.suffix.lower() != ".txt":
                yield row
                continue
            for number, line in enumerate(row.values["text"].split("\n"), start=1):
                if line.strip():
                    yield Row(f"{path}, line {number}", {"prompt": line.strip()})


def _dialogue(row: Row, number: int, option: str) -> Dialogue | str:
    """The row's dialogue, or the reason to skip it."""
    values = row.values
    document = _document(row, option)
    messages = document.messages
    if any(message["role"] == "tool" for message in messages):
        return TOOL_TURNS
    kept = tuple(message for message in messages if message["role"] != "assistant")
    # Messages after the last user turn are not answered.
    while kept and kept[-1]["role"] != "user":
        kept = kept[:-1]
    if not kept:
        return NOTHING_ASKED
    category = values.get("category")
    return Dialogue(
        number=number,
        id=next((values[key] for key in ID_KEYS if _is_id(values.get(key))), number),
        messages=kept,
        tools=document.tools,
        category=category if isinstance(category, str) else None,
        place=row.place,
        unused=tuple(key for key in document.unused if key not in (*ID_KEYS, "category")),
    )


def _document(row: Row, option: str) -> Document:
    """The turns of a row, and of what goes with them."""
    values = row.values
    if any(values.get(key) is not None for key in document_formats.CHAT_KEYS):
        return document_formats.document_of(row, option)
    for key in ("turns", "prompt"):
        turns = values.get(key)
        if isinstance(turns, list) and turns and all(isinstance(turn, str) for turn in turns):
            return document_formats.question_of(row, option, key)
        if isinstance(turns, list):
            raise UsageError(
                f"{option} {row.place}",
                f"{key} is not a list of texts",
                f'write {{"{key}": ["first question", "second question"]}}',
            )
    for question, answer in document_formats.PAIR_KEYS:
        if isinstance(values.get(question), str) and isinstance(values.get(answer), str):
            found = document_formats.question_of(row, option, question)
            return replace(found, unused=tuple(key for key in found.unused if key != answer))
    for key in QUESTION_KEYS:
        if isinstance(values.get(key), str):
            return document_formats.question_of(row, option, key)
    found = document_formats.document_of(row, option)
    asked = found.messages or ({"role": "user", "content": found.text},)
    return replace(found, messages=asked)


def _is_id(value: Any) -> bool:
    return isinstance(value, str | int) and not isinstance(value, bool) and value != ""
