"""One run at a time makes an output; what a killed run leaves stops nobody."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tools

from post_training.common import locks
from post_training.common.errors import UsageError

HOLDER = """
import os, sys
from pathlib import Path
from post_training.common import locks
with locks.hold(Path(sys.argv[1]), "python convert.py --save out"):
    if os.fork() == 0:  # a helper process outlives its parent
        sys.stdout.close(), sys.stdin.read(), os._exit(0)
    print("held", flush=True)
    sys.stdin.readline()
"""


def start_holder(target: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(target)],
        env=tools.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    return holder


@pytest.mark.parametrize(
    "attempt", [locks.check, lambda target: locks.hold(target, "").__enter__()]
)
def test_a_second_run_is_refused_with_what_holds_the_output(tmp_path, attempt):
    target = tmp_path / "new" / "out"
    holder = start_holder(target)
    with pytest.raises(UsageError) as refused:
        attempt(target)
    assert (
        f"process {holder.pid} on {socket.gethostname()} is making it since" in refused.value.cause
    )
    assert "(python convert.py --save out)" in refused.value.cause
    holder.communicate("\n")
    assert not list(target.parent.iterdir())
    with locks.hold(target, ""):
        pass


def test_a_killed_run_holds_nothing_although_its_helper_lives_on(tmp_path):
    target = tmp_path / "out"
    holder = start_holder(target)
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert locks._path(target).exists()
    locks.check(target)
    with locks.hold(target, "mine"):
        assert json.loads(locks._path(target).read_text())["process"] == os.getpid()
    holder.stdin.close()


def test_two_outputs_are_two_locks(tmp_path):
    with locks.hold(tmp_path / "a", ""), locks.hold(tmp_path / "b", ""):
        pass
    assert not list(tmp_path.iterdir())


@pytest.fixture
def no_locks(monkeypatch):
    """A file system without locks, such as NFS without its lock daemon."""

    def refuse(*given: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)


def test_without_locks_the_file_is_the_lock(tmp_path, no_locks):
    target = tmp_path / "out"
    with locks.hold(target, "mine"):
        with pytest.raises(UsageError, match="process"):
            locks.check(target)
        with pytest.raises(UsageError, match="process"), locks.hold(target, "other"):
            pass
    with locks.hold(target, "mine"):
        pass


@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ({"host": socket.gethostname(), "process": 1 << 30}, True),
        ({"host": "another-machine", "process": 1 << 30}, False),
        ({}, False),
        ([], False),
    ],
)
def test_without_locks_only_a_run_of_this_machine_is_known_to_be_over(
    tmp_path, no_locks, holder, free
):
    target = tmp_path / "out"
    locks._path(target).write_text(json.dumps(holder))
    if free:
        locks.check(target)
        with locks.hold(target, ""):
            pass
    else:
        with pytest.raises(UsageError) as refused:
            locks.check(target)
        assert f"delete {locks._path(target)}" in refused.value.remedy


def test_where_nothing_can_be_written_beside_the_output_the_lock_is_in_it(tmp_path, monkeypatch):
    """As in a container whose volume is the output's folder; root may write anywhere."""
    target = tmp_path / "run"
    target.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with locks.hold(target, "command"):
        assert (target / ".lock").exists()
        assert not (tmp_path / "run.lock").exists()
    assert not list(target.iterdir())


def test_a_place_where_no_lock_can_be_made_is_named():
    with pytest.raises(UsageError) as refused, locks.hold(Path("/proc/output"), "command"):
        pass
    assert "output /proc/output" in str(refused.value)
    assert "cannot be made: No such file or directory" in str(refused.value)
