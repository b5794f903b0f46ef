"""The flags that name a server to ask instead of loading a model. No torch, no network."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import SplitResult, urlsplit, urlunsplit

from post_training.common.errors import UsageError
from post_training.config.checks import at_least, positive
from post_training.config.flags import flag, group, spelled
from post_training.config.options import StageOptions

CLIENT = "openai"  # the package that talks to the server
KEY = "OPENAI_API_KEY"


@dataclass(frozen=True)
class Address:
    """Where a server is.

    Attributes:
        url: of the API, such as ``http://localhost:8000/v1``, with credentials if any were given.
        shown: the same without them.
        root: the server's own paths, such as ``/metrics``, lie below it.
    """

    url: str
    shown: str
    root: str

    @classmethod
    def of(cls, text: str, option: str) -> Address:
        """The address that a person wrote, whose ``/v1`` may be missing.

        Raises:
            UsageError: for what is no address of a server.
        """
        try:
            parts = urlsplit(text)
            parts.port  # noqa: B018  # raises for what is no port
        except ValueError as error:
            raise _no_address(option, "", "it is no URL: host or port") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise _no_address(option, _without_credentials(parts), "it is no http or https URL")
        if parts.query or parts.fragment:
            cause = "what follows ? or # would be lost: paths are appended to it"
            raise _no_address(option, _without_credentials(parts), cause)
        path = parts.path.rstrip("/") or "/v1"
        full = parts._replace(path=path)
        root = full._replace(path=path.removesuffix("/v1"))
        return cls(urlunsplit(full), _without_credentials(full), urlunsplit(root))


def _without_credentials(parts: SplitResult) -> str:
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))


def _no_address(option: str, shown: str, cause: str) -> UsageError:
    return UsageError(f"{option} {shown}".strip(), cause, "give e.g. http://localhost:8000/v1")


def is_address(text: str) -> bool:
    """Whether a text that may name a folder or a hub name names a server."""
    return text.startswith(("http://", "https://"))


def check_address(option: str, text: str) -> None:
    """Raise UsageError unless the text is the address of a server."""
    Address.of(text, option)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    TITLE: ClassVar[str] = "a server instead of the model"

    server: str | None = flag(
        metavar="URL",
        check=check_address,
        help="ask this OpenAI-compatible server (vLLM, SGLang, TensorRT-LLM, transformers serve); "
        "no model is loaded. A key is taken from OPENAI_API_KEY",
    )
    server_model: str | None = flag(
        metavar="NAME", help="the model's name there (its only one, where it has one)"
    )
    server_concurrency: int = flag(
        64, metavar="N", check=at_least(1), help="requests at a time (%(default)s)"
    )
    server_retries: int = flag(
        6,
        metavar="N",
        check=at_least(0),
        help="of a request that fails: connection lost, HTTP 408, 409, 429, 5xx (%(default)s)",
    )
    server_timeout: float = flag(
        600.0, metavar="S", check=positive, help="seconds that a request may take (%(default)s)"
    )

    @property
    def address(self) -> Address:
        """Of :attr:`server`, which is given."""
        return Address.of(str(self.server), "--server")


@dataclass(frozen=True, kw_only=True)
class ServedOptions(StageOptions):
    """Options of a stage that can ask a server."""

    serving: ServerOptions = group(ServerOptions)

    @property
    def asks_server(self) -> bool:
        """Whether a server does what the model would."""
        return self.serving.server is not None


def check(options: ServedOptions) -> None:
    """Raise UsageError for what does not go with ``--server``, or needs it."""
    if not options.asks_server:
        lost = [name for name in options.given if name.startswith("server_")]
        if lost:
            raise UsageError(
                f"{spelled(lost[0])} {options.given[lost[0]]}",
                "there is no --server, and a model is loaded",
                "give --server URL (SERVER=URL), or leave it out",
            )
        return
    _no_model(options.given)
    if options.parallel.world > 1:
        raise UsageError(
            f"{options.parallel.world} processes with --server",
            "one process asks the server, with --server-concurrency requests at a time",
            "leave out TP, PP, CP, EP, DP and torchrun",
        )
    if importlib.util.find_spec(CLIENT) is None:
        raise UsageError(
            "--server",
            f"the package {CLIENT}, with which servers are asked, is not installed",
            f"python -m pip install {CLIENT}",
        )


def _no_model(given: Mapping[str, Any]) -> None:
    if given.get("load"):
        raise UsageError(
            f"--load {given['load']} with --server",
            "the server has a model, and a second one is not loaded",
            "leave out one of them (unset MLM_MODEL_CKPT, or SERVER)",
        )
