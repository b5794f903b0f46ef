"""Servers for the stages' ``--server``: transformers' own, and a real one that misbehaves."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import speed
import tools

from post_training.cli.stage import make_plan
from post_training.distributed.client_session import ClientSession


def run(stage: Any, *flags: object, code: int = 0) -> dict[str, Any]:
    """Check and run a stage that asks a server, in this process. Returns what its work returned."""
    plan = make_plan(stage, [str(flag) for flag in flags])
    asked = stage.asked(plan.options)
    session = ClientSession(stage.name, plan.options.parallel, progress_bars=False)
    found = asked.work(plan, session)
    asked.show(plan, found, session)
    assert asked.exit_code(plan, found) == code
    return found


@contextmanager
def transformers_serve(folder: Path, log: Path) -> Iterator[str]:
    """``transformers serve`` with the model of a folder, in float32 on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["serve", str(folder), "--device", "cpu", "--dtype", "float32", "--host", "127.0.0.1"]
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "transformers.cli.transformers", *words, "--port", str(port)],
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=tools.environment(HF_HUB_OFFLINE="1"),
        )
    try:
        end = time.monotonic() + speed.scaled(120)
        while not _is_healthy(port):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def _is_healthy(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


@dataclass
class Reply:
    """What a request is answered with; a ``status`` of 0 closes the connection instead."""

    content: Any = None
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Scripted:
    """A server that answers as ``post`` says, which gets each request's number, path and body.

    ``asked`` has the bodies of the requests, ``keys`` their Authorization headers.
    """

    post: Callable[[int, str, dict[str, Any]], Reply]
    pages: dict[str, Any] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""


def models(*names: str, owner: str = "vllm", **more: Any) -> dict[str, Any]:
    return {"data": [{"id": name, "owned_by": owner, **more} for name in names]}


def chat_reply(text: str = "yes", **more: Any) -> dict[str, Any]:
    """A chat completion of the model ``tiny``."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
    }
    return {
        "model": "tiny",
        "choices": [choice],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        **more,
    }


@contextmanager
def scripted(
    post: Callable[[int, str, dict[str, Any]], Reply], pages: Mapping[str, Any] | None = None
) -> Iterator[Scripted]:
    """A server on this machine; ``pages`` are what GET finds, by path."""
    server = Scripted(post, {"/v1/models": models("tiny"), **(pages or {})})
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            page = server.pages.get(self.path)
            page = page() if callable(page) else page
            self.answer(Reply(status=404) if page is None else Reply(page))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                server.asked.append(body)
                server.keys.append(self.headers["Authorization"])
                number = len(server.asked)
            self.answer(server.post(number, self.path, body))

        def answer(self, reply: Reply) -> None:
            if not reply.status:
                self.close_connection = True
                return
            is_text = isinstance(reply.content, str)
            text = reply.content if is_text else json.dumps(reply.content)
            kind = "text/plain" if is_text else "application/json"
            if is_text and text.startswith("data:"):
                kind = "text/event-stream"
            self.send_response(reply.status)
            for name, value in {"Content-Type": kind, **reply.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that has gone is no news."""
            if not isinstance(sys.exception(), ConnectionError):
                super().handle_error(request, client_address)

    http_server = Server(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{http_server.server_port}"
    thread = threading.Thread(target=http_server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        http_server.shutdown()
        http_server.server_close()
        thread.join()
