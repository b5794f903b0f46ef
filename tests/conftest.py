"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest
import speed

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


# Minutes long each: the short ones after them let the workers finish together.
_FIRST = ("test_commands.py", "test_readers.py")


def pytest_configure() -> None:
    speed.share()  # before pytest-xdist starts workers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _FIRST)


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
    import quickstart_model

    return quickstart_model.make()


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
