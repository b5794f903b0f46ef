"""Answering dialogues with a server: each user turn in order, its own answers in context."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, NotRequired, TypedDict

from annotated_types import Ge, MinLen

from post_training.data.prompts import Dialogue
from post_training.inference.answered import CONTEXT, LENGTH, STOP, TOOL_CALLS, Answered
from post_training.inference.options import SamplingOptions
from post_training.servers.client import Client, MalformedError, RefusedError
from post_training.servers.identity import TENSORRT_LLM, Server

logger = logging.getLogger("post_training")

# What reasoning parsers of servers cut out of an answer, under either name.
_REASONING = ("reasoning_content", "reasoning")


class Usage(TypedDict):
    """Tokens of a request, as the server counts them."""

    prompt_tokens: Annotated[int, Ge(0)]
    completion_tokens: NotRequired[Annotated[int, Ge(0)] | None]


class _Message(TypedDict):
    content: NotRequired[str | None]
    tool_calls: NotRequired[list[Any] | None]
    reasoning_content: NotRequired[str | None]
    reasoning: NotRequired[str | None]


class _Choice(TypedDict):
    message: _Message
    finish_reason: NotRequired[str | None]


class _Reply(TypedDict):
    choices: Annotated[list[_Choice], MinLen(1)]
    usage: Usage


def plain_sampling(server: Server, sampling: SamplingOptions) -> dict[str, Any]:
    """Fields beside OpenAI's that make an engine choose as the options say.

    Engines take what a request leaves open from the model's generation_config.json, such as a
    repetition penalty.
    """
    if server.engine is None:
        return {"top_k": sampling.top_k} if sampling.top_k else {}
    every = 0 if server.engine == TENSORRT_LLM else -1  # how the engine spells "all tokens"
    return {"top_k": sampling.top_k or every, "repetition_penalty": 1.0, "min_p": 0.0}


@dataclass
class Asking:
    """How dialogues are answered by a server.

    Attributes:
        max_new_tokens: most tokens of one answer.
        seed: of the run; each answer has its own, made of it and of its place.
        template_options: further variables of the chat template.
        reasoning: answers of which the server cut out some reasoning, which the rows keep apart.
    """

    client: Client
    server: Server
    sampling: SamplingOptions
    max_new_tokens: int
    seed: int
    template_options: Mapping[str, Any] = field(default_factory=dict)
    reasoning: int = 0

    async def answer(self, dialogue: Dialogue, progress: Callable[[int], Any]) -> Answered:
        """Answer every user turn; ``progress`` is called with the number of turns that are done."""
        found = Answered(dialogue)
        while found.open:
            messages = found.asked()
            reply = await self._reply(dialogue, messages, len(found.finish_reasons))
            if reply is None:
                found.finish_reasons.append(CONTEXT)
            else:
                self._add(found, messages, reply)
            left = dialogue.messages[found.read :]
            progress(1 if found.open else 1 + sum(each["role"] == "user" for each in left))
        return found

    def _add(self, found: Answered, messages: list[dict[str, Any]], reply: _Reply) -> None:
        choice, usage = reply["choices"][0], reply["usage"]
        message, reason = choice["message"], choice.get("finish_reason")
        found.prompt_tokens += usage["prompt_tokens"]
        found.generated_tokens += usage.get("completion_tokens") or 0
        if message.get("tool_calls"):
            found.finish_reasons.append(TOOL_CALLS)
            return
        if reason not in (STOP, LENGTH):
            raise MalformedError(self.server.address, f"an answer ended by {reason!r}")
        answer: dict[str, Any] = {"role": "assistant", "content": message.get("content") or ""}
        thought = next((message[name] for name in _REASONING if message.get(name)), None)  # type: ignore[literal-required]
        if thought:
            self.reasoning += 1
            answer["reasoning_content"] = thought
        found.read += len(messages) - len(found.messages)
        found.messages = [*messages, answer]
        found.finish_reasons.append(str(reason))

    async def _reply(
        self, dialogue: Dialogue, messages: list[dict[str, Any]], turn: int
    ) -> _Reply | None:
        """None if the messages leave no room for an answer."""
        body = self._body(dialogue, messages, turn)
        extra = plain_sampling(self.server, self.sampling)
        if self.template_options:
            extra["chat_template_kwargs"] = dict(self.template_options)
        try:
            return await self.client.chat(_Reply, extra, **body)
        except RefusedError as error:
            if not error.about_length:
                raise
        # Less room than an answer may take: without a limit the answer gets what there is.
        del body["max_tokens"]
        try:
            return await self.client.chat(_Reply, extra, **body)
        except RefusedError as error:
            if error.about_length:
                return None
            raise

    def _body(
        self, dialogue: Dialogue, messages: list[dict[str, Any]], turn: int
    ) -> dict[str, Any]:
        sampling = self.sampling
        body: dict[str, Any] = {
            "messages": [
                {name: value for name, value in each.items() if name not in _REASONING}
                for each in messages
            ],
            "max_tokens": self.max_new_tokens,
            "temperature": sampling.temperature,
        }
        if sampling.temperature:
            body["top_p"] = sampling.top_p
            body["seed"] = seed_of(self.seed, f"{dialogue.number}/{turn}")
        if dialogue.tools:
            # They are for the chat template: an answer is the text that the model writes.
            body |= {"tools": list(dialogue.tools), "tool_choice": "none"}
        return body


def seed_of(seed: int, name: str) -> int:
    """A seed for one answer, from the run's and the answer's place; 31 bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4]) >> 1
