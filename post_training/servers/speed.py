"""Answers that come token by token, timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from post_training.common.errors import UsageError
from post_training.servers.client import Client, MalformedError


@dataclass(frozen=True)
class Question:
    """What is asked: ``body`` has ``messages``, or a ``prompt`` of tokens."""

    id: str | int
    body: Mapping[str, Any]
    category: str | None = None


@dataclass
class Timed:
    """An answer, and when it came: seconds from the request to its first token and to its end.

    ``parts`` without choices have what the engine tells besides.
    """

    question: Question
    text: str = ""
    tokens: int = 0
    first: float = 0.0
    seconds: float = 0.0
    parts: list[Mapping[str, Any]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


async def ask(
    client: Client, question: Question, extra: Mapping[str, Any], max_tokens: int
) -> Timed:
    """The greedy answer to a question.

    Raises:
        UsageError: also if the server does not say how many tokens it has.
    """
    found = Timed(question)
    begun = time.perf_counter()
    usage = None
    stream = client.stream(extra, max_tokens=max_tokens, temperature=0.0, **question.body)
    async for part in stream:
        usage = part.get("usage") or usage
        found.parts = [*found.parts[-1:], part]
        for choice in part.get("choices") or ():
            text = _text(choice)
            if text and not found.first:
                found.first = time.perf_counter() - begun
            found.text += text
    found.seconds = time.perf_counter() - begun
    found.first = found.first or found.seconds
    tokens = (usage or {}).get("completion_tokens")
    if not isinstance(tokens, int):
        raise MalformedError(client.address, "its stream ends without usage.completion_tokens")
    found.tokens = tokens
    return found


def _text(choice: Mapping[str, Any]) -> str:
    """The text of a part; a reasoning parser gives it another name."""
    delta = choice.get("delta")
    if not isinstance(delta, Mapping):
        return str(choice.get("text") or "")
    names = ("reasoning_content", "reasoning", "content")
    return "".join(str(delta.get(name) or "") for name in names)


def summary(answers: Sequence[Timed], seconds: float) -> dict[str, Any]:
    """Speed over all answers, which took so long together, and the wait for the first token."""
    tokens = sum(each.tokens for each in answers)
    if not tokens:
        raise UsageError("the server's answers", "they have no token", "ask other prompts")
    waits = sorted(each.first for each in answers)
    return {
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 3),
        "seconds_to_first_token": {
            "median": round(statistics.median(waits), 5),
            "p90": round(waits[min(len(waits) - 1, int(0.9 * len(waits)))], 5),
        },
    }
