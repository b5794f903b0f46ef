"""Dialogues with their answers, and what is counted of them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from post_training.data.prompts import Dialogue

# Why an answer ended, as in OpenAI's API. There is none at all, and the dialogue ends, if there was
# no room for it, or if a server made tool calls of it.
STOP, LENGTH, CONTEXT, TOOL_CALLS = "stop", "length", "context", "tool_calls"
UNANSWERED = (CONTEXT, TOOL_CALLS)


@dataclass
class Answered:
    """A dialogue with its answers so far.

    ``messages`` are in OpenAI form, ``finish_reasons`` one for each answer (or for its absence).
    """

    dialogue: Dialogue
    messages: list[dict[str, Any]] = field(default_factory=list)
    finish_reasons: list[str] = field(default_factory=list)
    prompt_tokens: int = 0
    generated_tokens: int = 0
    read: int = 0

    @property
    def answers(self) -> list[str]:
        return [each["content"] for each in self.messages if each["role"] == "assistant"]

    @property
    def open(self) -> bool:
        """Whether a user turn has no answer yet."""
        ended = any(reason in UNANSWERED for reason in self.finish_reasons)
        return not ended and self.read < len(self.dialogue.messages)

    def asked(self) -> list[dict[str, Any]]:
        """The messages up to and with the next user turn."""
        following = self.dialogue.messages[self.read :]
        roles = [message["role"] for message in following]
        return [*self.messages, *following[: roles.index("user") + 1]]

    def row(self) -> dict[str, Any]:
        """The line of the output file."""
        dialogue = self.dialogue
        row: dict[str, Any] = {"id": dialogue.id, "messages": self.messages}
        if dialogue.tools:
            row["tools"] = list(dialogue.tools)
        metadata = {
            "index": dialogue.number,
            "finish_reasons": self.finish_reasons,
            "prompt_tokens": self.prompt_tokens,
            "generated_tokens": self.generated_tokens,
        }
        if dialogue.category is not None:
            metadata["category"] = dialogue.category
        return {**row, "metadata": metadata}


def totals(answered: Sequence[Answered], seconds: float) -> dict[str, float]:
    """What the answers add to the sums of a run that took ``seconds`` for them."""
    reasons = [reason for each in answered for reason in each.finish_reasons]
    return {
        "prompts": len(answered),
        "answers": sum(reason not in UNANSWERED for reason in reasons),
        "cut_at_max_new_tokens": reasons.count(LENGTH),
        "ended_by_context": reasons.count(CONTEXT),
        "empty_answers": sum(not text.strip() for each in answered for text in each.answers),
        "prompt_tokens": sum(each.prompt_tokens for each in answered),
        "generated_tokens": sum(each.generated_tokens for each in answered),
        "generation_seconds": round(seconds, 3),
    }
