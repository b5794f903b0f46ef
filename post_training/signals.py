"""Ctrl-C and SIGTERM end a process promptly, also while it waits inside a collective.

Python runs signal handlers between bytecodes only, so a rank blocked in C++ (a gloo or NCCL wait)
never sees one. The interpreter's wake-up descriptor is written by the C-level handler at once; a
thread reads it and ends the process if the main thread has not unwound within ``GRACE`` seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator

GRACE = 5.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a scheduler sends before a job's time is over: SIGTERM, or SIGUSR1 (sbatch --signal).
TIME_LIMIT = (signal.SIGTERM, signal.SIGUSR1)
_deferred: set[int] = set()


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by the first signal. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it."""
        return 128 + self.number


@contextlib.contextmanager
def prompt_exit(cleanup: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Within this context a signal raises :class:`Interrupted`, and a stuck process still ends.

    Args:
        cleanup: called by the watching thread just before it ends a stuck process.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    finished = threading.Event()

    def interrupt(number: int, _frame: object) -> None:
        # A second signal must not break the unwinding that the first one began.
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(number)

    def watch() -> None:
        received = reader.recv(1)
        while received and received[0] in _deferred:
            received = reader.recv(1)
        if not received or finished.wait(GRACE):
            return
        cleanup()
        sys.stderr.flush()
        os._exit(128 + received[0])

    handlers = {number: signal.signal(number, interrupt) for number in _SIGNALS}
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, name="signal-watch", daemon=True).start()
    try:
        yield
    finally:
        finished.set()
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()


@contextlib.contextmanager
def deferred(numbers: Iterable[int] = TIME_LIMIT) -> Iterator[Callable[[], bool]]:
    """Within this context these signals only make the yielded function return True.

    For work that ends by itself when asked, such as a training loop, which first finishes its step
    and saves. A process that is stuck is then not ended: whoever sent the signal has to.
    """
    received: list[int] = []
    chosen = list(numbers)
    handlers = {each: signal.signal(each, lambda n, _: received.append(n)) for each in chosen}
    _deferred.update(chosen)
    try:
        yield lambda: bool(received)
    finally:
        _deferred.difference_update(chosen)
        for number, handler in handlers.items():
            signal.signal(number, handler)
