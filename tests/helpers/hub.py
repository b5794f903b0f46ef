"""A Hugging Face hub of one model on this machine, as far as ``snapshot_download`` asks it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import xxhash

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """``environment`` sends a stage here; ``sent`` has the names of the files that were fetched."""

    folder: Path
    name: str
    sent: list[str] = field(default_factory=list)
    port: int = 0

    @property
    def environment(self) -> dict[str, str]:
        return {
            "HF_ENDPOINT": f"http://127.0.0.1:{self.port}",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }


def _hash(content: bytes) -> str:
    return xxhash.xxh3_128_hexdigest(content)


def _described(path: Path) -> dict[str, object]:
    """As both lists of the hub have it."""
    content = path.read_bytes()
    described = {"type": "file", "path": path.name, "size": len(content), "oid": _hash(content)}
    return {**described, "rfilename": path.name}


@contextmanager
def serving(folder: Path, name: str) -> Iterator[Hub]:
    """The files of ``folder`` as the model ``name`` (org/name)."""
    hub = Hub(folder, name)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            if path.startswith(f"/api/models/{name}/"):
                files = [_described(each) for each in sorted(folder.iterdir())]
                about = {"id": name, "modelId": name, "sha": COMMIT, "siblings": files}
                is_tree = path.startswith(f"/api/models/{name}/tree/")
                self._answer(json.dumps(files if is_tree else about).encode(), "application/json")
                return
            file = folder / path.rsplit("/", 1)[-1]
            if not path.startswith(f"/{name}/resolve/") or not file.is_file():
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if self.command == "GET":
                hub.sent.append(file.name)
            self._answer(file.read_bytes(), "application/octet-stream")

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{_hash(body)}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Requests are no news."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_port
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
