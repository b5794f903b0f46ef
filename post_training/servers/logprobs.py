"""Log probabilities of given tokens, in the ways in which servers give them.

- Completions with ``logprobs`` list the most probable next tokens (vLLM and others).
- Completions with ``echo`` besides give the tokens of the prompt (vLLM and others).
- SGLang's own ``/generate`` gives any token, and the tokens of the prompt.

One request finds out what a server offers, before the work. Prompts are tokens, so that they are
those of a model that is loaded here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NotRequired, TypedDict

from annotated_types import MinLen

from post_training.common.errors import UsageError
from post_training.servers import identity
from post_training.servers.client import Client, MalformedError, RefusedError
from post_training.servers.identity import Server

_COUNTS = (20, 5)  # next tokens: vLLM's most by default, OpenAI's
_ID = "token_id:"


class _Listed(TypedDict):
    tokens: NotRequired[list[str]]
    token_logprobs: NotRequired[list[float | None] | None]
    top_logprobs: NotRequired[list[dict[str, float] | None] | None]


class _Choice(TypedDict):
    logprobs: NotRequired[_Listed | None]


class _Usage(TypedDict):
    prompt_tokens: int


class _Reply(TypedDict):
    choices: Annotated[list[_Choice], MinLen(1)]
    usage: NotRequired[_Usage | None]


class _Meta(TypedDict):
    output_token_ids_logprobs: NotRequired[list[Any] | None]
    input_token_logprobs: NotRequired[list[Any] | None]


class _Native(TypedDict):
    meta_info: _Meta


@dataclass(frozen=True)
class Offer:
    """What a server gives.

    Attributes:
        next_tokens: how many of the most probable next tokens it lists; 0: none.
        of_prompt: the log probabilities of a prompt's tokens too.
        reasons: why it does not give what it does not, in its words.
    """

    next_tokens: int
    of_prompt: bool
    reasons: tuple[str, ...] = ()


class LogProbabilities:
    """Of tokens, as one server gives them."""

    def __init__(self, client: Client, server: Server, texts: Mapping[int, Sequence[str]]) -> None:
        """``texts`` are how tokens that are asked for may be spelled, by number."""
        self._client, self._server, self._texts = client, server, texts
        self._native = server.engine == identity.SGLANG
        self.offer = Offer(0, False)

    async def probe(self, prompt: Sequence[int]) -> Offer:
        """Find out what the server offers; raise UsageError for a server that is not there."""
        if self._native:
            self.offer = Offer(_COUNTS[0], True)
            return self.offer
        count, reasons = 0, []
        for wanted in _COUNTS:
            said = await self._try(prompt, wanted, echo=False)
            if said is None:
                count = wanted
                break
            reasons.append(said)
        said = await self._try(prompt, 1, echo=True)
        reasons += [] if said is None else [said]
        self.offer = Offer(count, said is None, tuple(dict.fromkeys(reasons)))
        return self.offer

    async def _try(self, prompt: Sequence[int], count: int, *, echo: bool) -> str | None:
        """None if it works, else why not."""
        try:
            listed = await self._complete(prompt, count, echo=echo)
        except RefusedError as error:
            if error.status in (401, 403, 404, 429) or error.status >= 500:
                raise
            return error.said
        of_tokens = (listed or {}).get("token_logprobs")
        given: Any = of_tokens if echo else (listed or {}).get("top_logprobs")
        if not given or (echo and len(given) < len(prompt)):
            return f"it leaves out {'echo' if echo else 'logprobs'} without a word"
        return None

    async def next_of(self, prompt: Sequence[int], tokens: Sequence[int]) -> list[float | None]:
        """Log probabilities of ``tokens`` after a prompt; None where the server lists others."""
        if self._native:
            reply = await self._generate(prompt, token_ids_logprob=list(tokens))
            rows = reply["meta_info"].get("output_token_ids_logprobs") or [None]
            found = {row[1]: row[0] for row in rows[0] or ()}
            return [self._finite(found.get(each)) for each in tokens]
        listed = await self._complete(prompt, self.offer.next_tokens, echo=False)
        top = ((listed or {}).get("top_logprobs") or [None])[0]
        if not top:
            raise MalformedError(self._server.address, "an answer has no logprobs.top_logprobs")
        return [self._finite(self._listed(top, each)) for each in tokens]

    def _listed(self, top: Mapping[str, float], token: int) -> float | None:
        return next((top[name] for name in self._names(token) if name in top), None)

    def _names(self, token: int) -> Sequence[str]:
        return (f"{_ID}{token}", *self._texts.get(token, ()))

    async def of_prompt(self, prompt: Sequence[int]) -> list[float]:
        """Log probabilities of a prompt's tokens after the first, each after those before it."""
        found: list[Any]
        if self._native:
            reply = await self._generate(prompt, logprob_start_len=0)
            found = [row[0] for row in reply["meta_info"].get("input_token_logprobs") or ()]
        else:
            listed = await self._complete(prompt, 1, echo=True)
            found = list((listed or {}).get("token_logprobs") or ())
        if len(found) < len(prompt):
            cause = f"it gave {len(found)} log probabilities of a prompt of {len(prompt)} tokens"
            raise MalformedError(self._server.address, cause)
        return [self._required(each) for each in found[1 : len(prompt)]]

    async def _complete(self, prompt: Sequence[int], count: int, *, echo: bool) -> _Listed | None:
        extra = {"return_tokens_as_token_ids": True} if self._server.engine == identity.VLLM else {}
        more = {"echo": True} if echo else {}
        reply: _Reply = await self._client.complete(
            _Reply,
            extra,
            prompt=list(prompt),
            max_tokens=1,
            temperature=0.0,
            logprobs=count,
            **more,
        )
        return reply["choices"][0].get("logprobs")

    async def _generate(self, prompt: Sequence[int], **wanted: Any) -> _Native:
        sampling = {"max_new_tokens": 1, "temperature": 0.0}
        body = {"input_ids": list(prompt), "sampling_params": sampling, "return_logprob": True}
        found: _Native = await self._client.native("/generate", _Native, {**body, **wanted})
        return found

    async def prompt_size(self, text: str) -> int | None:
        """Tokens that the server makes of a text; None if it does not tell."""
        reply: _Reply = await self._client.complete(
            _Reply, {}, prompt=text, max_tokens=1, temperature=0.0
        )
        usage = reply.get("usage")
        return usage["prompt_tokens"] if usage else None

    def _finite(self, value: Any) -> float | None:
        return None if value is None else self._required(value)

    def _required(self, value: Any) -> float:
        """The value; UsageError unless it is a number and no NaN."""
        if isinstance(value, int | float) and not math.isnan(value):
            return float(value)
        raise UsageError(
            f"server {self._server.address.shown}",
            f"a log probability is {value}: the model's logits are not finite",
            "check the model: evaluate.sh or mmlu.sh without --server names the tensor",
        )


def refuse(server: Server, what: str, offer: Offer) -> UsageError:
    """A server that does not give what a measure needs."""
    said = f" ({'; '.join(offer.reasons)})" if offer.reasons else ""
    return UsageError(
        f"{what} with --server {server.address.shown}",
        f"the server gives no log probabilities for it{said}",
        "vLLM (--max-logprobs 20 or more) and SGLang do; or load the model: leave out --server",
    )
