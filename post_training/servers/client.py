"""Requests to an OpenAI-compatible server: retried, their answers checked, errors explained.

The client library waits as a server's ``Retry-After`` says, and longer each time where it says
nothing. What still fails then is a UsageError, and so is an answer in another form than OpenAI's.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator, Mapping
from pathlib import PurePath
from types import TracebackType
from typing import Any, Self

from post_training.common import forms, redaction
from post_training.common.errors import UsageError, first_line
from post_training.config.server_options import KEY, Address, ServerOptions

_FORM_TRIES = 3  # of a request whose answer has another form than OpenAI's
_LONGEST = 500  # characters of a server's message
_ABOUT_LENGTH = re.compile(
    r"context.length|context.window|model length|max_model_len|max_seq_len|max_num_tokens"
    r"|sequence length",
    re.I,
)
_REMEDIES = {
    401: f"give the server's key in {KEY}",
    403: f"give a key in {KEY} that may use this model",
    404: "name a model that the server has in --server-model, and the address of its API, which "
    "usually ends in /v1",
    429: "lower --server-concurrency, or raise --server-retries; what is done is kept",
}


class RefusedError(UsageError):
    """The server answered with an error. ``said`` is its message."""

    def __init__(self, address: Address, status: int, said: str) -> None:
        self.said = redaction.hide(said)[:_LONGEST]
        remedy = _REMEDIES.get(status, "change what it objects to, or look into the server's log")
        if status >= 500:
            remedy = "look into the server's log; the same command resumes what can be resumed"
        super().__init__(f"server {address.shown}", f"HTTP {status}: {self.said}", remedy)
        self.status = status

    @property
    def about_length(self) -> bool:
        """Whether prompt and answer together are too long for the model."""
        return self.status in (400, 413, 422) and bool(_ABOUT_LENGTH.search(self.said))


class Client:
    """Asks one server for one model; an asynchronous context."""

    def __init__(self, address: Address, model: str, options: ServerOptions) -> None:
        import openai

        self.address, self.model, self._options = address, model, options
        self._api = openai.AsyncOpenAI(
            base_url=address.url,
            api_key=os.environ.get(KEY) or "none",
            timeout=options.server_timeout,
            max_retries=options.server_retries,
            # What follows a redirect may lose the request, and gets the key.
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, timeout=options.server_timeout
            ),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        await self._api.close()

    async def chat(self, form: Any, extra: Mapping[str, Any], **body: Any) -> Any:
        """A chat completion, in a ``form``; ``extra`` are fields that OpenAI's API has not."""
        create = self._api.chat.completions.with_raw_response.create
        return await self._ask(create, form, extra, body)

    async def complete(self, form: Any, extra: Mapping[str, Any], **body: Any) -> Any:
        """A completion of text or tokens, in a ``form``."""
        return await self._ask(self._api.completions.with_raw_response.create, form, extra, body)

    async def native(self, path: str, form: Any, body: Mapping[str, Any]) -> Any:
        """POST to a path of the server's own API, for an answer in a ``form``."""
        api = self._api.with_options(base_url=self.address.root)
        try:
            content = await api.post(path, cast_to=object, body=dict(body))
        except Exception as error:
            raise self.explained(error) from error
        try:
            return forms.parse(content, form, "", "")
        except UsageError as error:
            raise MalformedError(self.address, f"in its answer {error.cause}") from error

    async def _ask(
        self, create: Any, form: Any, extra: Mapping[str, Any], body: Mapping[str, Any]
    ) -> Any:
        for left in reversed(range(_FORM_TRIES)):
            try:
                raw = await create(model=self.model, extra_body=dict(extra) or None, **body)
                return self._parsed(raw.text, form)
            except MalformedError:
                if not left:
                    raise
                await asyncio.sleep(0.1)
            except Exception as error:
                raise self.explained(error) from error
        raise AssertionError("the last try returns or raises")

    def _parsed(self, text: str, form: Any) -> Any:
        try:
            content = json.loads(text)
        except ValueError as error:
            cause = f"it answered no JSON: {redaction.hide(text[:100])!r}"
            raise MalformedError(self.address, cause) from error
        try:
            found = forms.parse(content, form, "", "")
        except UsageError as error:
            raise MalformedError(self.address, f"in its answer {error.cause}") from error
        self.require_model(content.get("model"))
        return found

    async def stream(self, extra: Mapping[str, Any], **body: Any) -> AsyncIterator[dict[str, Any]]:
        """The parts of a chat completion, or of a completion of a ``prompt``, as they come."""
        api = self._api.completions if "prompt" in body else self._api.chat.completions
        try:
            parts = await api.create(
                model=self.model,
                stream=True,
                stream_options={"include_usage": True},
                extra_body=dict(extra) or None,
                **body,
            )
            async for part in parts:
                if not hasattr(part, "model_dump"):
                    raise MalformedError(self.address, f"it streamed {str(part)[:100]!r}")
                self.require_model(part.model)
                yield part.model_dump()
        except UsageError:
            raise
        except Exception as error:
            raise self.explained(error) from error

    def require_model(self, name: Any) -> None:
        """Raise UsageError where another model answered than was asked."""
        # transformers serve adds a revision, others a date; some leave out folders.
        if not name or str(name).startswith(self.model) or name == PurePath(self.model).name:
            return
        raise UsageError(
            f"--server-model {self.model}",
            f"the server {self.address.shown} answered as another model, {name}",
            "name a model that it has; GET /v1/models lists them",
        )

    def explained(self, error: Exception) -> UsageError:
        """What a failed request is to a person; the exception itself if it is none of a request."""
        import openai

        what, tries = f"server {self.address.shown}", self._options.server_retries + 1
        if isinstance(error, openai.APIStatusError):
            return _refused(self.address, error)
        if isinstance(error, openai.APITimeoutError):
            return UsageError(
                what,
                f"no answer within {self._options.server_timeout:g} s, {tries} times",
                "raise --server-timeout, or lower --server-concurrency",
            )
        if isinstance(error, openai.APIConnectionError):
            return unreachable(self.address, error.__cause__ or error, tries)
        if isinstance(error, openai.APIError):  # within a stream
            return RefusedError(self.address, 500, str(error.message))
        if isinstance(error, ValueError):  # a stream's part that is no JSON
            return MalformedError(self.address, first_line(error))
        raise error


class MalformedError(UsageError):
    """An answer that is none of OpenAI's API."""

    def __init__(self, address: Address, cause: str) -> None:
        remedy = "give the address of an OpenAI-compatible API, which usually ends in /v1"
        super().__init__(f"server {address.shown}", redaction.hide(cause), remedy)


def unreachable(address: Address, error: BaseException, tries: int = 1) -> UsageError:
    """Nothing answered, or the connection broke off."""
    return UsageError(
        f"server {address.shown}",
        f"it cannot be reached, or left in the middle ({tries} "
        f"{'try' if tries == 1 else 'tries'}): {redaction.hide(first_line(error))[:_LONGEST]}",
        "start it, and give the same command again: what can be resumed resumes",
    )


def _refused(address: Address, error: Any) -> UsageError:
    """An answer whose status is an error's, or a redirect's."""
    target = error.response.headers.get("location")
    if 300 <= error.status_code < 400 and target:
        return UsageError(
            f"server {address.shown}",
            f"HTTP {error.status_code}: it redirects to {redaction.hide(target)}, which is not "
            "followed: the key would go there",
            "give that address",
        )
    return RefusedError(address, error.status_code, message_in(error.body) or str(error.message))


def message_in(body: Any) -> str:
    """A server's message in the body of an error: OpenAI's form, FastAPI's, or text."""
    if isinstance(body, Mapping):
        for name in ("message", "error", "detail"):
            if body.get(name):
                return message_in(body[name])
    return body if isinstance(body, str) else str(body or "")
