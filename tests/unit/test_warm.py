"""A fork of the warm process behaves as a Python process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tools
import warm

pytestmark = pytest.mark.skipif(not warm.is_possible(), reason="CUDA does not survive a fork")


@pytest.fixture
def program(tmp_path):
    """Writes a script; returns the line that runs it warm, and that of plain Python."""

    def write(text: str, *words: str) -> tuple[list[str], list[str]]:
        path = tmp_path / "program.py"
        path.write_text(text)
        return warm.command(path, *words), [sys.executable, str(path), *words]

    return write


@pytest.mark.parametrize(
    "text",
    [
        "import os, sys; print(sys.argv[1:], os.getcwd(), os.environ['OWN'], sys.stdin.read())",
        "import sys; print('said', file=sys.stderr); sys.exit(7)",
        "import sys; sys.exit('a message')",
        "raise SystemExit",
        "import atexit; atexit.register(print, 'at the end'); print('first')",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "from pathlib import Path; print(Path(__file__).name, __name__)",
    ],
)
def test_it_ends_and_prints_as_plain_python_does(program, tmp_path, text):
    results = [
        subprocess.run(
            line, cwd=tmp_path, env={**os.environ, "OWN": "x y"}, input=b"in", capture_output=True
        )
        for line in program(text, "one", "two words")
    ]
    fork, plain = ((done.returncode, done.stdout, done.stderr) for done in results)
    assert fork == plain


def test_an_error_is_shown_with_its_traceback(program):
    line, _ = program("def f():\n    1 / 0\nf()")
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert "program.py" in done.stderr


def test_it_is_warm_and_shares_nothing_with_other_forks(program):
    line, _ = program(
        "import sys; print('megatron.core' in sys.modules, hasattr(sys, 'mine')); sys.mine = 1"
    )
    for _ in range(2):
        assert subprocess.run(line, capture_output=True, text=True).stdout == "True False\n"


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 3), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_signal_to_the_client_reaches_the_fork(program, tmp_path, sent, code):
    line, _ = program(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))\n"
        "open(sys.argv[1], 'w').write(str(os.getpid()))\n"
        "time.sleep(60)",
        str(tmp_path / "number"),
    )
    client = subprocess.Popen(line)
    number = tmp_path / "number"
    while not (number.is_file() and number.read_text()):
        time.sleep(0.05)
    client.send_signal(sent)
    assert client.wait() == code
    while Path(f"/proc/{number.read_text()}").exists():
        time.sleep(0.05)


def test_torchrun_starts_forks(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(
        "import os, sys; print('megatron.core' in sys.modules, os.environ['RANK'], flush=True)"
    )
    line = warm.command(path, processes=2)
    done = subprocess.run(line, env=tools.environment(), capture_output=True, text=True)
    assert sorted(done.stdout.split("\n")) == ["", "True 0", "True 1"], done.stderr
