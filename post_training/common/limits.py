"""Limits of memory and of computing time for code that comes with a model: its chat template."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_TEMPLATE_BYTES = 2 << 30
_TEMPLATE_SECONDS = 10.0
_SIGNAL, _TIMER = signal.SIGVTALRM, signal.ITIMER_VIRTUAL  # nothing else here uses them


class _Expired(BaseException):  # no template's or library's `except Exception` takes it
    """The time is over; raised in the thread that is limited, wherever it is."""


@contextlib.contextmanager
def of_a_template() -> Iterator[None]:
    """What a chat template may take for one conversation: 2 GiB and 10 seconds of computing.

    Raises:
        MemoryError, TimeoutError: if it takes more; the message says so.
    """
    with seconds(_TEMPLATE_SECONDS), memory(_TEMPLATE_BYTES):
        yield


@contextlib.contextmanager
def memory(more: int) -> Iterator[None]:
    """Within this context this process may map at most ``more`` bytes than it does now.

    What needs more gets a MemoryError that says so. Other threads are under the same limit: leave
    them room.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + more
    if before[0] != resource.RLIM_INFINITY:
        limit = min(limit, before[0])
    resource.setrlimit(resource.RLIMIT_AS, (limit, before[1]))
    try:
        yield
    except MemoryError:
        raise MemoryError(f"it takes more than {more >> 30} GiB of memory") from None
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class _Watch:
    """A thread's computing time and its limit."""

    def __init__(self, limit: float) -> None:
        self.thread = threading.get_ident()
        self.clock = time.pthread_getcpuclockid(self.thread)
        self.end = time.clock_gettime(self.clock) + limit
        self.expired = False

    def left(self) -> float:
        """Seconds; 0 or less when the time is over."""
        return self.end - time.clock_gettime(self.clock)


_watched: set[_Watch] = set()  # of threads but the main one
_lock = threading.Lock()
_watcher = 0  # the process whose thread looks at them: a fork has none


@contextlib.contextmanager
def seconds(limit: float) -> Iterator[None]:
    """Within this context this thread may compute for ``limit`` seconds; waiting does not count.

    Raises:
        TimeoutError: if it takes more. In the main thread a signal interrupts the arithmetic of a
            long integer too; another thread is interrupted between two of Python's instructions.
    """
    watch = _Watch(limit)
    is_main = threading.current_thread() is threading.main_thread()
    context = _by_signal if is_main else _by_watcher
    try:
        with context(watch):
            yield
    except _Expired:
        raise TimeoutError(f"it takes more than {limit:g} seconds of computing") from None


@contextlib.contextmanager
def _by_signal(watch: _Watch) -> Iterator[None]:
    def ring(_number: int, _frame: Any) -> None:
        if (left := watch.left()) > 0:  # other threads' time is counted by the timer
            signal.setitimer(_TIMER, max(left, 0.01))
        else:
            raise _Expired

    before = signal.signal(_SIGNAL, ring)
    try:
        signal.setitimer(_TIMER, watch.left())
        yield
    finally:
        signal.setitimer(_TIMER, 0)
        signal.signal(_SIGNAL, before)


@contextlib.contextmanager
def _by_watcher(watch: _Watch) -> Iterator[None]:
    _start_watcher()
    with _lock:
        _watched.add(watch)
    try:
        yield
        _end(watch)
    except _Expired:
        raise
    except BaseException:
        with contextlib.suppress(_Expired):
            _end(watch)
        raise
    finally:
        with _lock:
            _watched.discard(watch)


def _end(watch: _Watch) -> None:
    """No longer watch; what has been raised already, and is on its way, arrives here."""
    with _lock:
        _watched.discard(watch)
    while watch.expired:
        time.sleep(0.001)


def _start_watcher() -> None:
    global _watcher
    with _lock:
        if _watcher == os.getpid():
            return
        _watcher = os.getpid()
    threading.Thread(target=_look, name="limits", daemon=True).start()


def _look() -> None:
    """Twice a second, raise in each thread whose time is over."""
    while True:
        time.sleep(0.5)
        with _lock:
            for watch in _watched:
                if not watch.expired and watch.left() <= 0:
                    watch.expired = True
                    thread, error = ctypes.c_ulong(watch.thread), ctypes.py_object(_Expired)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)
