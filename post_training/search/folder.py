"""The folder of a search: what lies in it, and whether it may be used. No torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from post_training.common import outputs
from post_training.common.errors import UsageError
from post_training.search.results import SENSITIVITIES, TRIALS

REPORT, PAGE = "search.json", "report.html"
_HELD = (TRIALS, SENSITIVITIES)
_FILES = (REPORT, PAGE, "report.md")
_ROOM = 1 << 20  # bytes: a trial's manifest takes a few thousand


def check(folder: Path) -> None:
    """Raise UsageError unless the folder is new, empty, or that of a search."""
    what = f"--search-dir {folder}"
    if folder.exists() and not folder.is_dir():
        raise UsageError(what, "it is a file", "name a folder")
    foreign = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in foreign if name not in (*_HELD, *_FILES)]
    if foreign:
        raise UsageError(
            what, f"it holds something else than a search: {foreign[0]}", "name another folder"
        )
    outputs.disk_space(folder, _ROOM)
    outputs.writable(folder, what)


def prepare(folder: Path, *, overwrite: bool) -> None:
    """Make the folder; with ``overwrite`` forget what was measured."""
    for name in _HELD if overwrite else ():
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in _FILES if overwrite else ():
        (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
