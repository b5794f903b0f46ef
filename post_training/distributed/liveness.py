"""A rank or node that is lost ends all ranks within a minute, by name.

Left alone, the other ranks wait in a collective until its time is over (ten minutes), and what they
say then names neither the rank nor its machine. So every rank keeps one idle TCP connection to rank
0. The kernel closes it when the process dies, and TCP keepalive (10 s idle, then 4 probes 5 s
apart) when the machine does; rank 0 tells the others. No heartbeats are sent from Python, where a
rank that is busy would look dead.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import sys
import threading
from typing import Any

from post_training.distributed import placement, signals

EXIT_CODE = 69  # EX_UNAVAILABLE of sysexits.h: another rank was lost
GRACE = 5.0  # seconds in which a rank may still fail with a message of its own
_SETTLE = 0.5  # seconds between a failed collective and the news of who is gone
_CONNECT_SECONDS = 30.0
_KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_USER_TIMEOUT = 30_000  # milliseconds until data that is not acknowledged breaks a connection
_BYE = b"bye\n"


class Watch:
    """This rank's part; :meth:`leave` before a deliberate end, whatever its exit code."""

    def __init__(self, rank: int, hosts: list[str], local_rank: int) -> None:
        self._rank = rank
        self._hosts = hosts
        self._speaks = rank == 0 or local_rank == 0
        self._connections: dict[int, socket.socket] = {}
        self._left = threading.Event()
        self._missed = threading.Event()
        self._lock = threading.Lock()

    def leave(self) -> None:
        """Say goodbye: this rank ends on purpose and is not to be missed."""
        self._left.set()
        with self._lock:
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    connection.sendall(_BYE)

    def follows_a_loss(self, error: Exception) -> bool:
        """Whether ``error`` comes from the loss of another rank; then its traceback says nothing.

        The message about the loss and the failure of a collective come at almost the same time.
        """
        if not self._missed.wait(_SETTLE):
            return False
        first = (str(error).strip().splitlines() or [""])[0]
        print(
            f"rank {self._rank}: ended by that: {type(error).__name__}: {first}",
            file=sys.stderr,
            flush=True,
        )
        return True

    def serve(self, listener: socket.socket, token: str) -> None:
        """Rank 0: accept the others, and notice when one is gone. Runs in a thread."""
        with selectors.DefaultSelector() as selector, listener:
            selector.register(listener, selectors.EVENT_READ, None)
            while not self._left.is_set():
                for key, _ in selector.select(timeout=1.0):
                    if key.data is None:
                        found = self._accept(listener, token)
                        if found is not None:
                            selector.register(found[1], selectors.EVENT_READ, found[0])
                        continue
                    connection = self._connections[key.data]
                    said = _receive(connection)
                    selector.unregister(connection)
                    if said != _BYE:
                        self._lost(key.data)

    def follow(self, connection: socket.socket) -> None:
        """Any other rank: wait for what rank 0 says, or for its end. Runs in a thread."""
        self._connections[0] = connection
        said = _receive(connection)
        if said == _BYE:
            return
        gone = said.decode().strip()
        self._lost(int(gone) if gone.isdecimal() else 0)

    def _accept(self, listener: socket.socket, token: str) -> tuple[int, socket.socket] | None:
        connection, _ = listener.accept()
        connection.settimeout(_CONNECT_SECONDS)
        with contextlib.suppress(OSError, ValueError):
            said, _, rank = _first_line(connection).partition(" ")
            if secrets.compare_digest(said, token) and 0 < int(rank) < len(self._hosts):
                connection.settimeout(None)
                _keep_alive(connection)
                with self._lock:
                    self._connections[int(rank)] = connection
                return int(rank), connection
        connection.close()
        return None

    def _lost(self, rank: int) -> None:
        if self._left.is_set():
            return
        self._missed.set()
        if self._rank == 0:
            with self._lock:
                for other, connection in self._connections.items():
                    if other != rank:
                        with contextlib.suppress(OSError):
                            connection.sendall(f"{rank}\n".encode())
        if self._speaks:
            print(
                f"error: rank {rank} on host {self._hosts[rank]} is lost\n"
                "  cause: its process or machine ended, or the network between it and rank 0 "
                f"(host {self._hosts[0]}) did\n"
                "  remedy: see what that rank wrote last and that machine's memory and log; all "
                "ranks end now, finished outputs are untouched",
                file=sys.stderr,
                flush=True,
            )
        if not self._left.wait(GRACE):
            signals.exit_now(EXIT_CODE)


def start(rank: int, world: int) -> Watch | None:
    """Watch over all ranks from now on; a collective call. None for a process that is alone."""
    if world == 1:
        return None
    import torch

    listener, token = None, ""
    mine: dict[str, Any] = {"host": placement.host()}
    if rank == 0:
        listener = _listen()
        token = secrets.token_hex(16)
        mine |= {"port": listener.getsockname()[1], "token": token}
    everyone: list[Any] = [None] * world
    torch.distributed.all_gather_object(everyone, mine)
    watch = Watch(rank, [each["host"] for each in everyone], placement.placement().local_rank)
    if listener is not None:
        _in_thread(watch.serve, listener, token)
        return watch
    address = (os.environ["MASTER_ADDR"], everyone[0]["port"])
    try:
        connection = connect(address, everyone[0]["token"], rank)
    except OSError as error:
        print(
            f"rank {rank}: no connection to rank 0 at {address[0]}:{address[1]} ({error}); a lost "
            "rank shows only when a collective's time is over",
            file=sys.stderr,
        )
        return watch
    _in_thread(watch.follow, connection)
    return watch


def connect(address: tuple[str, int], token: str, rank: int) -> socket.socket:
    """A connection to rank 0, which knows ``rank`` by the token that only the ranks have.

    Raises:
        OSError: if rank 0 cannot be reached.
    """
    connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
    connection.settimeout(None)
    _keep_alive(connection)
    connection.sendall(f"{token} {rank}\n".encode())
    return connection


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (*_KEEPALIVE.items(), ("TCP_USER_TIMEOUT", _USER_TIMEOUT)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _first_line(connection: socket.socket) -> str:
    """What a rank says first. Byte by byte: what follows it is another message."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 64:
        line += connection.recv(1) or b"\n"
    return line.decode().strip()


def _receive(connection: socket.socket) -> bytes:
    """One short line, or nothing when the connection has ended."""
    try:
        return connection.recv(64)
    except OSError:
        return b""


def _in_thread(function: Any, *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, name="liveness", daemon=True).start()
