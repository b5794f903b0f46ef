"""Checks of output paths before the work: occupied, writable, room on the disk. No torch.

Each raises a UsageError that names the path, the cause and the remedy.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from post_training.common import manifest
from post_training.common.errors import UsageError
from post_training.common.inputs import nearest_existing


def check_folder(folder: Path, *, overwrite: bool, needed: int = 0) -> None:
    """Check that ``folder`` can be written: not occupied, parent writable, room for ``needed``.

    Args:
        folder: output folder of a stage; it gets its name when it is complete.
        overwrite: an existing output is replaced when the new one is complete.
        needed: estimated bytes.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder}", "it is a file", "name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(
            f"output folder {folder}",
            _what_lies_there(folder),
            "delete it, name another, or give --overwrite (MLM_EXTRA_ARGS=--overwrite)",
        )
    disk_space(folder, needed)
    writable(folder)


def check_file(path: Path, option: str, *, overwrite: bool) -> None:
    """Check that the file ``path``, which ``option`` names, can be written."""
    if path.is_dir():
        raise UsageError(f"{option} {path}", "it is a folder", "name a file")
    if path.exists() and not overwrite:
        raise UsageError(f"{option} {path}", "it exists", "name another file, or give --overwrite")
    writable(path, f"{option} {path}")


def writable(path: Path, what: str = "") -> None:
    """Raise UsageError unless this user may create ``path``, a file or a folder.

    An output is renamed into place, so the folder above it counts even where it exists.

    Args:
        what: the output in a message (``output <path>``).
    """
    parent = nearest_existing(path.absolute().parent)
    if not parent.is_dir():
        raise UsageError(what or f"output {path}", f"{parent} is a file", "name another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(
            what or f"output {path}",
            f"user {os.getuid()} may not write to {parent}, which is user {parent.stat().st_uid}'s",
            "name another place, or run as its user; in docker: "
            'docker run --user "$(id -u):$(id -g)"',
        )


def disk_space(folder: Path, needed: int) -> None:
    """Raise UsageError unless the file system of ``folder`` has ``needed`` bytes free."""
    parent = nearest_existing(folder)
    if not parent.is_dir():
        raise UsageError(f"output {folder}", f"{parent} is a file", "name another folder")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(
            f"output {folder}",
            f"about {_gigabytes(needed)} are needed and {_gigabytes(free)} are free on {parent}",
            "free some space, or set MLM_WORK_DIR to a larger disk",
        )


def _what_lies_there(folder: Path) -> str:
    """What an occupied output folder holds: why it is not overwritten."""
    content = manifest.read(folder)
    if content is None:
        return "it is not empty, and no stage's manifest says what it is"
    made = f"it holds the output of {content.get('stage')}, finished {content.get('finished')}"
    if manifest.damaged_outputs(folder, content):
        return f"{made}, now damaged"
    if content.get("command") == manifest.command():
        return f"{made}, complete, made by this same command"
    return f"{made}, complete, made by: {content.get('command')}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
