"""A lost rank or node ends all ranks within a minute and is named, with exit code 69.

So does a rank that finds a usage error which the others do not see: its message is shown, and all
end with code 2.

Nothing else does that. If a process dies, gloo fails at once, naming an IP address and exiting with
any code; if its machine falls silent, gloo was still waiting after three minutes (the collective's
timeout is ten), torchrun ends the ranks of its own node only, and srun waits for ``SlurmdTimeout``.

So every rank keeps one idle TCP connection to rank 0. The kernel closes it when the process dies,
and keepalive (10 s idle, then 4 probes 5 s apart) when the machine does. There are no heartbeats
from Python, where a busy rank looks dead.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

from post_training.common.errors import EXIT_CODE as USAGE_ERROR
from post_training.distributed import placement, signals

EXIT_CODE = 69  # EX_UNAVAILABLE of sysexits.h: another rank was lost
GRACE = 5.0  # seconds in which a rank may still fail with a message of its own
_SETTLE = 0.5  # seconds between a failed collective and the news of which rank is lost
_CONNECT_SECONDS = 30.0
_OPTIONS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
_WELCOME = b"welcome\n"  # rank 0's answer: from now on the rank would be missed
_BYE, _FAILED = "bye", "failed "  # what a rank says last; after the second its message, as JSON
_LONGEST_LINE = 1 << 16


class Watch:
    """This rank's part; :meth:`leave` before a deliberate end, whatever its exit code."""

    def __init__(self, rank: int, hosts: list[str]) -> None:
        self._rank = rank
        self._hosts = hosts
        self._connections: dict[int, socket.socket] = {}
        self._left = threading.Event()
        self._missed = threading.Event()
        self._answered = threading.Event()  # rank 0 has said its last
        self._lock = threading.Lock()

    def leave(self, failure: str = "") -> None:
        """Say goodbye: this rank ends on purpose and is not to be missed.

        Args:
            failure: why it ends, if the others must end too.
        """
        self._left.set()
        self._tell(_FAILED + json.dumps(failure) if failure else _BYE)
        if failure and self._connections and self._rank != 0:
            # torchrun ends its other ranks when the first has ended: rank 0 has to speak before.
            self._answered.wait(2 * GRACE)

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
        """Rank 0: accept the others, and follow each. Runs in a thread."""
        while True:
            _in_thread(self._welcome, listener.accept()[0], token)

    def _welcome(self, connection: socket.socket, token: str) -> None:
        with contextlib.suppress(OSError, TypeError, ValueError), connection.makefile() as lines:
            said, _, rank = lines.readline(64).partition(" ")
            if secrets.compare_digest(said, token) and 0 < int(rank) < len(self._hosts):
                with self._lock:
                    self._connections[int(rank)] = connection
                    connection.sendall(_WELCOME)
                self.follow(int(rank), connection, lines)

    def follow(self, other: int, connection: socket.socket, lines: TextIO | None = None) -> None:
        """Wait until rank ``other`` says goodbye or is lost. Runs in a thread."""
        _keep_alive(connection)
        with self._lock:
            self._connections[other] = connection
        said = ""
        with contextlib.suppress(OSError):
            said = (lines or connection.makefile()).readline(_LONGEST_LINE).strip()
        if other == 0:
            self._answered.set()
        if said.startswith(_FAILED):
            self._failed(json.loads(said.removeprefix(_FAILED)))
        elif said != _BYE:
            self._lost(int(said) if said.isdecimal() else other)

    def _failed(self, message: str) -> None:
        """End with a rank that failed, unless this one finds the same and ends by itself."""
        if self._left.wait(GRACE) or self._missed.is_set():
            return
        self._missed.set()
        if self._rank == 0:
            self._tell(_FAILED + json.dumps(message))
            print(f"error: {message}", file=sys.stderr, flush=True)
        signals.exit_now(USAGE_ERROR)

    def _lost(self, rank: int) -> None:
        if self._left.is_set() or self._missed.is_set():
            return
        self._missed.set()
        if self._rank == 0:
            self._tell(str(rank))
        if self._speaks_of(rank):
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

    def _speaks_of(self, lost: int) -> bool:
        """Whether this rank is the first of its machine that is left."""
        here = self._hosts[self._rank]
        left = (rank for rank, host in enumerate(self._hosts) if host == here and rank != lost)
        return self._rank == next(left)

    def _tell(self, line: str) -> None:
        """Send a line to every connected rank."""
        with self._lock:
            for connection in self._connections.values():
                with contextlib.suppress(OSError):
                    connection.sendall(f"{line}\n".encode())


def start(place: placement.Placement) -> Watch | None:
    """Watch over all ranks from now on; a collective call. None for a process that is alone."""
    rank, world = place.rank, place.world
    if world == 1:
        return None
    from post_training.distributed.collectives import from_all_ranks

    listener, token = None, ""
    mine: dict[str, Any] = {"host": placement.host()}
    if rank == 0:
        listener = socket.create_server(
            ("", 0),
            family=socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET,
            dualstack_ipv6=socket.has_dualstack_ipv6(),
            backlog=world,
        )
        token = secrets.token_hex(16)
        mine |= {"port": listener.getsockname()[1], "token": token}
    everyone = from_all_ranks(mine)
    watch = Watch(rank, [each["host"] for each in everyone])
    if listener is not None:
        _in_thread(watch.serve, listener, token)
        return watch
    address = (os.environ["MASTER_ADDR"], everyone[0]["port"])
    try:
        connection = connect(address, everyone[0]["token"], rank)
    except OSError as error:
        print(
            f"rank {rank}: no connection to rank 0 at {address[0]}:{address[1]} ({error}); a lost "
            "rank shows only at a collective's timeout",
            file=sys.stderr,
        )
        return watch
    _in_thread(watch.follow, 0, connection)
    return watch


def connect(address: tuple[str, int], token: str, rank: int) -> socket.socket:
    """A connection to rank 0, which knows ``rank`` by the token that only the ranks have.

    Raises:
        OSError: if rank 0 cannot be reached.
    """
    connection = socket.create_connection(address, timeout=_CONNECT_SECONDS)
    connection.sendall(f"{token} {rank}\n".encode())
    if connection.recv(len(_WELCOME), socket.MSG_WAITALL) != _WELCOME:
        raise OSError("it did not answer")
    connection.settimeout(None)
    return connection


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _in_thread(function: Callable[..., None], *arguments: Any) -> None:
    threading.Thread(target=function, args=arguments, name="liveness", daemon=True).start()
