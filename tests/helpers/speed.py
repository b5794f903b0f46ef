"""How slow this machine is right now, so that the tests' time limits fit it.

Limits are written for an idle machine of two cores; a slower or a loaded one gets more time:

    timeout=speed.scaled(60)                           # a limit in seconds
    speed.wait(lambda: file.exists(), 20, "the file")  # poll until it is true
    speed.run(["bash", script], 60, env=...)           # subprocess.run with text captured

``wait`` and ``run`` measure again before they give up: the load may have come since. The limit of
pytest-timeout, by marker or configuration, is scaled too (``conftest.py``).

A measurement starts a Python process for each of two cores and computes in both: 0.35 s on an idle
machine. It is made once for a pytest run and all its workers, which share the file that
``POST_TRAINING_SPEED`` names, and again when it is older than ``VALID`` seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

REFERENCE = 0.35  # seconds of a measurement on an idle machine
VALID = 120.0
LARGEST = 40.0
_FILE = "POST_TRAINING_SPEED"
_PROGRAM = "x = 0\nfor i in range(3_000_000): x += i * i"


def scaled(seconds: float) -> float:
    """A time limit for an idle machine, in seconds of this machine as it is now."""
    return seconds * factor()


def factor() -> float:
    """How many times longer this machine takes than the idle reference; at least 1."""
    share()
    file = Path(os.environ[_FILE])
    try:
        if time.time() - file.stat().st_mtime < VALID:
            return float(file.read_text())
    except (OSError, ValueError):
        pass  # not measured yet
    return measure()


def measure() -> float:
    """The factor, measured now and kept for everybody."""
    share()
    line = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    started = time.monotonic()
    for process in [subprocess.Popen(line) for _ in range(2)]:
        process.wait()
    found = min(max(1.0, (time.monotonic() - started) / REFERENCE), LARGEST)
    file = Path(os.environ[_FILE])
    work = file.with_name(f"{file.name}.{os.getpid()}")
    work.write_text(str(found))
    work.replace(file)
    return found


def share() -> None:
    """Choose the file, unless that is done; the processes that are started later share it."""
    if _FILE not in os.environ:
        os.environ[_FILE] = str(Path(tempfile.gettempdir()) / f"post_training_speed.{os.getpid()}")


def wait(condition: Callable[[], Any], seconds: float, what: str, pause: float = 0.2) -> None:
    """Poll until ``condition`` is true.

    Raises:
        TimeoutError: naming ``what``, if it is false after ``scaled(seconds)``.
    """
    started = time.monotonic()
    limit = scaled(seconds)
    while not condition():
        passed = time.monotonic() - started
        if passed > limit:
            limit = seconds * max(factor(), measure())
            if passed > limit:
                raise TimeoutError(f"{what} did not come within {passed:.0f} s")
        time.sleep(pause)


def run(
    words: Sequence[object], seconds: float, check: bool = False, **options: Any
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` with output captured as text, and ``scaled(seconds)`` as time limit.

    Raises:
        subprocess.TimeoutExpired: if it takes longer; the process is killed.
        subprocess.CalledProcessError: with ``check``, if the exit code is not 0.
    """
    line = [str(word) for word in words]
    kinds = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    started = time.monotonic()
    with subprocess.Popen(line, **kinds) as process:
        try:
            try:
                output, errors = process.communicate(timeout=scaled(seconds))
            except subprocess.TimeoutExpired:
                more = started + seconds * measure() - time.monotonic()
                output, errors = process.communicate(timeout=max(more, 0.1))
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(line, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done
