"""The quickstart's trained model, made once for each state of its sources and kept between runs.

It lies in ``POST_TRAINING_CACHE``, by default below the user's cache folder.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from quickstart.train import Recipe, is_finished

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def _kept() -> Iterator[Path]:
    """The folder, of which others that want it wait for the end."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "post_training"
    cache = Path(os.environ.get("POST_TRAINING_CACHE", default))
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "tiny.lock"):
        yield cache / "tiny"


def make() -> Path:
    """The folder, with the trained model."""
    with _kept() as folder:
        line = [sys.executable, "-m", "quickstart.train", "--output", str(folder), "--force"]
        subprocess.run(line, cwd=ROOT, check=True)
    return folder


@contextlib.contextmanager
def shared_with(trained: Path) -> Iterator[None]:
    """Within it the quickstart runs, which trains the same model in the folder ``trained``.

    Where the model is kept already, ``trained`` is a copy of it; else it is kept afterwards.
    """
    with _kept() as folder:
        if is_finished(folder, Recipe()):
            shutil.copytree(folder, trained)
        yield
        if is_finished(trained, Recipe()) and not is_finished(folder, Recipe()):
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(trained, folder)
