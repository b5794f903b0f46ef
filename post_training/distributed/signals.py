"""Ctrl-C and SIGTERM end a process promptly, also while it waits inside a collective.

Python runs signal handlers between bytecodes only, so a rank blocked in C++ (a gloo or NCCL wait)
never sees one. The interpreter's wake-up descriptor is written by the C-level handler at once; a
thread reads it and ends the process if the main thread has not unwound within ``GRACE`` seconds.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

GRACE = 5.0
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# What a scheduler sends before a job's time is over: SIGTERM, or SIGUSR1 (sbatch --signal).
TIME_LIMIT = (signal.SIGTERM, signal.SIGUSR1)
_deferred: set[int] = set()
_received: set[int] = set()


class Interrupted(KeyboardInterrupt):
    """Raised in the main thread by the first signal. ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)  # all that another rank needs to make it again
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name

    @property
    def exit_code(self) -> int:
        """128 + signal number, as shells report it."""
        return 128 + self.number


def _raise(error: Interrupted) -> NoReturn:
    raise error


@contextlib.contextmanager
def prompt_exit(end: Callable[[Interrupted], NoReturn] = _raise) -> Iterator[Callable[[], None]]:
    """Within this context a signal raises :class:`Interrupted`, and a stuck process still ends.

    Signals that are :func:`deferred` stay so.

    Args:
        end: called when the exception has left the block; further signals are ignored until it is
            done. It is called at once until the function that this context gives has been: torch's
            imports run inside C++ code, which aborts on an exception of a signal handler.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    finished, imported = threading.Event(), threading.Event()

    def interrupt(number: int, _frame: object) -> None:
        # A second signal must not break the unwinding that the first one began.
        for each in chosen:
            signal.signal(each, signal.SIG_IGN)
        (_raise if imported.is_set() else end)(Interrupted(number))

    def dropped(failure: sys.UnraisableHookArgs) -> None:
        # Python drops what a handler raises within a destructor: the signal is sent once more.
        if not isinstance(failure.exc_value, Interrupted):
            report(failure)
            return
        for each in chosen:
            signal.signal(each, interrupt)
        again = threading.Timer(0.01, os.kill, (os.getpid(), failure.exc_value.number))
        again.daemon = True
        again.start()

    def watch() -> None:
        received = reader.recv(1)
        while received and received[0] in _deferred:
            received = reader.recv(1)
        if not received or finished.wait(GRACE):
            return
        sys.stderr.flush()
        exit_now(128 + received[0])

    chosen = [number for number in _SIGNALS if number not in _deferred]
    handlers = {number: signal.signal(number, interrupt) for number in chosen}
    report, sys.unraisablehook = sys.unraisablehook, dropped
    previous = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, name="signal-watch", daemon=True).start()
    try:
        yield imported.set
    except Interrupted as error:
        end(error)
    finally:
        finished.set()
        sys.unraisablehook = report
        signal.set_wakeup_fd(previous)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        writer.close()


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raise a signal as itself where torch puts it, as a rank's failure, into its own error."""
    try:
        yield
    except BaseException as error:
        for failure, _ in getattr(error, "failures", {}).values():
            if isinstance(failure, Interrupted):
                raise failure from None
        raise


@contextlib.contextmanager
def deferred(numbers: Iterable[int] = TIME_LIMIT) -> Iterator[None]:
    """Within this context these signals only make :func:`asked_to_end` return True.

    For work that ends by itself when asked, such as a training loop, which first finishes its step
    and saves. A process that is stuck is then not ended: whoever sent the signal has to. Signals
    that are deferred already stay so when an inner context ends.
    """
    chosen = [number for number in numbers if number not in _deferred]
    handlers = {each: signal.signal(each, _note) for each in chosen}
    _deferred.update(chosen)
    try:
        yield
    finally:
        _deferred.difference_update(chosen)
        _received.difference_update(chosen)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def defer_until_exit(numbers: Iterable[int] = TIME_LIMIT) -> None:
    """The same from now on, for a program whose exit code is to say that it ended when asked."""
    chosen = list(numbers)
    for each in chosen:
        signal.signal(each, _note)
    _deferred.update(chosen)
    # The interpreter gives them their default action back while it ends, but not what is ignored.
    atexit.register(lambda: [signal.signal(each, signal.SIG_IGN) for each in chosen])


def _note(number: int, _frame: object) -> None:
    _received.add(number)


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however that ends. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def exit_now(code: int) -> NoReturn:
    """End this process at once, whatever it waits for."""
    os._exit(code)


def asked_to_end() -> bool:
    """Whether a deferred signal has come."""
    return bool(_received)
