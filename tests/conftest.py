"""Fixtures that several test files share.

``tiny_model`` is the quickstart's trained model, made once for each state of its sources and kept
between runs in ``POST_TRAINING_CACHE`` (by default below the user's cache folder).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest
import speed

ROOT = Path(__file__).resolve().parent.parent
# Property tests: the same examples in every run of the suite, and an hour's worth of others.
_PROPERTIES = {
    "suppress_health_check": list(hypothesis.HealthCheck),
    "database": None,
    "print_blob": True,
}
hypothesis.settings.register_profile(
    "suite", max_examples=2000, derandomize=True, deadline=None, **_PROPERTIES
)
hypothesis.settings.register_profile(
    "hour",
    max_examples=int(os.environ.get("PROPERTY_EXAMPLES", "50000")),
    deadline=1000,
    **_PROPERTIES,
)
hypothesis.settings.load_profile("suite")


def pytest_configure() -> None:
    speed.share()  # before pytest-xdist starts workers


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Scale pytest-timeout's limit to the speed of this machine, before that plugin reads it."""
    marker = item.get_closest_marker("timeout")
    named = dict(marker.kwargs) if marker else {}
    given = named.pop("timeout", None) or (marker.args[0] if marker and marker.args else None)
    limit = float(given or item.config.getoption("timeout") or item.config.getini("timeout") or 0)
    if limit > 0:
        item.add_marker(pytest.mark.timeout(speed.scaled(limit), **named), append=False)
    return (yield)


@pytest.fixture(autouse=True)
def _own_variables() -> Generator[None]:
    """What a test, or the code it calls, sets in the environment reaches no other test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def environment(tmp_path):
    """A user's environment: nothing of the interface set, this Python, a work folder."""
    import launchers

    return launchers.environment(tmp_path)


@pytest.fixture(scope="session")
def tiny_model() -> Path:
    """Folder of the trained tiny Qwen3 with its data; concurrent test workers wait for one."""
    from filelock import FileLock

    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "post_training"
    cache = Path(os.environ.get("POST_TRAINING_CACHE", default))
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / "tiny"
    with FileLock(cache / "tiny.lock"):
        subprocess.run(
            [sys.executable, "-m", "quickstart.train", "--output", str(folder), "--force"],
            cwd=ROOT,
            check=True,
        )
    return folder


@pytest.fixture(scope="session")
def drafted(tmp_path_factory):
    """Drafted checkpoints of two targets, decoded, validated and exported at three layouts.

    Made once for all test workers, which share the parent of their temporary folders.
    """
    import drafted_checkpoints
    from filelock import FileLock

    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    work, finished = root / "drafted", root / "drafted.finished"
    with FileLock(root / "drafted.lock"):
        if not finished.exists():
            work.mkdir()
            drafted_checkpoints.make(work)
            finished.touch()
    return drafted_checkpoints.Drafted(work)
