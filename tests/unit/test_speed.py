"""Time limits that follow the speed of the machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

import pytest
import speed
import tools


@pytest.fixture(autouse=True)
def own_file(tmp_path, monkeypatch):
    """What is measured here must not reach other tests."""
    file = tmp_path / "speed"
    monkeypatch.setenv("POST_TRAINING_SPEED", str(file))
    return file


def test_limits_are_scaled_by_one_measurement_for_all_processes(own_file):
    first = speed.factor()
    assert 1 <= first <= speed.LARGEST
    assert float(own_file.read_text()) == first
    own_file.write_text("3.5")  # as another process has measured
    assert speed.scaled(2) == 7.0


def test_an_old_measurement_is_made_again(own_file):
    own_file.write_text("39.5")
    past = time.time() - speed.VALID - 1
    os.utime(own_file, (past, past))
    assert speed.factor() != 39.5


def test_a_wait_measures_again_before_it_gives_up(own_file, monkeypatch):
    own_file.write_text("1.0")
    monkeypatch.setattr(speed, "REFERENCE", 0.001)  # now the machine counts as very slow
    started = time.monotonic()
    speed.wait(lambda: time.monotonic() > started + 1, 0.2, "a second")
    with pytest.raises(TimeoutError, match="what never comes"):
        speed.wait(lambda: False, 0.01, "what never comes", pause=0.01)


def test_a_command_gets_more_time_on_a_slower_machine(own_file, monkeypatch):
    words = [sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(1)"]
    own_file.write_text("1.0")
    monkeypatch.setattr(speed, "REFERENCE", 0.001)
    assert speed.run(words, 0.5).stdout == "begun\n"
    with pytest.raises(subprocess.TimeoutExpired):
        speed.run([sys.executable, "-c", "import time; time.sleep(600)"], 0.01)


def test_the_limit_of_a_test_is_scaled(own_file, tmp_path):
    """pytest-timeout's, by configuration or by marker, in a run of its own."""
    own_file.write_text("3.0")
    shutil.copy(tools.ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\ntimeout = 100\n")
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "def limit(request): return request.node.get_closest_marker('timeout').args[0]\n"
        "def test_configured(request): assert limit(request) == 300\n"
        "@pytest.mark.timeout(10)\n"
        "def test_marked(request): assert limit(request) == 30\n"
    )
    done = speed.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", tmp_path, "-p", "no:cacheprovider"],
        60,
        env={**os.environ, "PYTHONPATH": str(tools.ROOT / "tests" / "helpers")},
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
