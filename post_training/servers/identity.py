"""Which server answers, and which of its models: asked once, before the work."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict
from urllib.parse import urlsplit

from post_training.common import forms, redaction
from post_training.common.errors import UsageError, suggest
from post_training.config.server_options import KEY, Address, ServerOptions
from post_training.servers.client import MalformedError, RefusedError, message_in, unreachable

if TYPE_CHECKING:
    from requests import Response

_SECONDS = 30.0
VLLM, SGLANG, TENSORRT_LLM = "vllm", "sglang", "tensorrt_llm"
# By the owner of the models that they list: the paths that tell their version.
_ENGINES = {VLLM: ("/version",), SGLANG: ("/server_info", "/get_server_info")}
_ENGINES[TENSORRT_LLM] = ("/version",)
_SHOWN = 10


class _Model(TypedDict):
    id: str
    owned_by: NotRequired[str | None]
    max_model_len: NotRequired[int | None]


class _Models(TypedDict):
    data: list[_Model]


@dataclass(frozen=True)
class Server:
    """A server and the model that it is asked for.

    Attributes:
        engine: ``vllm``, ``sglang``, ``tensorrt_llm``; None for another.
        version: the engine's, if it tells.
        positions: most tokens of a prompt and its answer, if it tells.
    """

    address: Address
    model: str
    engine: str | None = None
    version: str | None = None
    positions: int | None = None
    described: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As manifests and reports record it; without credentials."""
        return {
            "url": self.address.shown,
            "model": self.model,
            "engine": self.engine,
            "version": self.version,
        }

    def __str__(self) -> str:
        engine = " ".join(filter(None, (self.engine, self.version))) or "an unnamed engine"
        return f"{self.model} on {self.address.shown} ({engine})"


def find(address: Address, model: str | None, *, preferred: str | None = None) -> Server:
    """The server at an address, and the ``model`` there, or its only one.

    ``preferred`` is taken where it has that and others.

    Raises:
        UsageError: if it is not there, refuses the key, has no such model, or several and none is
            named.
    """
    response = get(address, f"{address.url}/models")
    listed: list[_Model] = []
    if response.status_code == 200:
        listed = _models(address, response)
    elif not model or response.status_code in (401, 403):
        raise _refused(address, response)
    # transformers serve lists what the hub's cache holds, which may be nothing of what it has.
    by_name = {each["id"]: each for each in listed}
    engine = next((each.get("owned_by") for each in listed), None)
    engine = engine if engine in _ENGINES else None
    if model is None and preferred in by_name:
        model = preferred
    elif model is None:
        model = _only(address, list(by_name))
    elif model not in by_name and engine is not None:
        raise UsageError(
            f"--server-model {model}",
            f"the server {address.shown} has {_several(list(by_name))}",
            suggest(model, by_name) or "name one of them, or leave it out",
        )
    positions = by_name[model].get("max_model_len") if model in by_name else None
    described = _described(address, engine)
    version = described.get("version")
    return Server(address, model, engine, version and str(version), positions, described)


def report_name(serving: ServerOptions) -> str:
    """What a report about a server's model is called by."""
    host = urlsplit(serving.address.shown).netloc.replace(":", "_")
    return serving.server_model or host


def get(address: Address, url: str) -> Response:
    """GET with the key; a redirect is not followed. UsageError where nothing answers."""
    import requests

    key = os.environ.get(KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    try:
        return requests.get(url, headers=headers, timeout=_SECONDS, allow_redirects=False)
    except requests.RequestException as error:
        raise unreachable(address, error) from error


def _models(address: Address, response: Response) -> list[_Model]:
    try:
        found: _Models = forms.parse(response.json(), _Models, "", "")
    except (ValueError, UsageError) as error:
        said = error.cause if isinstance(error, UsageError) else "it is no JSON"
        raise MalformedError(address, f"its list of models: {said}") from error
    return found["data"]


def _refused(address: Address, response: Response) -> UsageError:
    target = response.headers.get("location")
    if target and response.is_redirect:
        cause = f"it redirects to {redaction.hide(target)}, which is not followed"
        return UsageError(f"server {address.shown}", cause, "give that address")
    try:
        said = message_in(response.json())
    except ValueError:
        said = response.text
    return RefusedError(address, response.status_code, said or "its models cannot be listed")


def _only(address: Address, names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    raise UsageError(
        "--server-model (not given)",
        f"the server {address.shown} has {_several(names)}",
        "name the one to ask",
    )


def _several(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}" if names else "no model"


def _described(address: Address, engine: str | None) -> dict[str, Any]:
    """What the engine tells about itself; nothing where it does not."""
    for path in _ENGINES.get(engine or "", ()):
        try:
            response = get(address, f"{address.root}{path}")
            content = response.json() if response.status_code == 200 else None
        except (UsageError, ValueError):
            continue
        if isinstance(content, dict):
            return content
    return {}
