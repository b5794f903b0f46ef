"""Fixtures that several test files share.

``tiny_model`` is the quickstart's trained model, made once for each state of its sources and kept
between runs in ``POST_TRAINING_CACHE`` (by default below the user's cache folder).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


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
