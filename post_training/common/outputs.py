"""Checks of output paths before the work: occupied, writable, room on the disk. No torch.

Each raises a UsageError that names the path, the cause and the remedy.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from post_training.common import files, manifest, ownership, redaction, report
from post_training.common.errors import UsageError, first_line
from post_training.common.inputs import nearest_existing

# What an output is, by the stages that make such.
CHECKPOINT = ("convert", "quantize", "prune", "distill", "finetune", "eagle3")
EXPORT = ("export",)
_RESERVED = (".incomplete", ".lock")  # siblings of an output while it is made
_LONGEST_NAME = 230  # of the 255 of most file systems: .incomplete.json and others are appended
_NO_ROOM = 1 << 16  # bytes
_REPORT = 1 << 20  # bytes: all answers of MMLU, one letter each, take less than a tenth


def check_folder(
    folder: Path, made_by: Sequence[str] = CHECKPOINT, *, overwrite: bool, needed: int = 0
) -> None:
    """Check that ``folder`` can be written: not occupied, parent writable, room for ``needed``.

    Args:
        folder: output folder of a stage; it gets its name when it is complete.
        made_by: stages whose outputs are of the same kind.
        overwrite: an existing output of that kind is replaced when the new one is complete.
        needed: estimated bytes.
    """
    _require_no_link(folder, f"output {folder}")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder}", "it is a file", "name a folder")
    work = files.incomplete(folder)
    if work.is_symlink() or (os.path.lexists(work) and not work.is_dir()):
        raise UsageError(
            f"output {folder}", f"{work}, where it is made, is no folder", "move that away"
        )
    if work.is_dir() and not (files.is_begun(work) or manifest.read(work)):
        raise UsageError(
            f"output {folder}",
            f"{work}, where it is made, holds something else than a killed run's part of it",
            "move that away, or name another folder",
        )
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UsageError(
            f"output folder {folder}",
            _what_lies_there(folder),
            "delete it, name another, or give --overwrite (MLM_EXTRA_ARGS=--overwrite)",
        )
    if folder.is_dir():
        ownership.require_own(folder, made_by)
    disk_space(folder, needed)
    writable(folder)


def check_file(path: Path, option: str, stage: str) -> None:
    """Check that the report ``path``, which ``option`` names, can be written.

    Raises:
        UsageError: if it exists and is no report of ``stage``, or its folder cannot be written.
    """
    if path.is_dir():
        raise UsageError(f"{option} {path}", "it is a folder", "name a file")
    if path.exists():
        try:
            found = (manifest.read(path) or {}).get("stage")
        except (UsageError, AttributeError):
            found = None
        if found != stage:
            cause = f"it exists, and is no report of {stage}"
            raise UsageError(f"{option} {path}", cause, "name another file")
    disk_space(path, _REPORT)
    writable(path, f"{option} {path}")


def check_apart(
    outputs: Mapping[str, Path], given: Mapping[str, Any], *, in_place: bool = False
) -> None:
    """Check that no output is an input, another output, the folder of one, a home or the root.

    Args:
        outputs: by flag.
        given: all other values of the command line, by flag; those that are paths are inputs.
        in_place: an output may be an input.
    """
    read = {
        _resolved(path): f"{flag} {value}"
        for flag, values in given.items()
        for value in (values if isinstance(values, list | tuple) else [values])
        if isinstance(value, str | Path) and str(value) and _exists(path := Path(value))
    }
    written: dict[Path, str] = {}
    for flag, output in outputs.items():
        target, what = _resolved(output), f"{flag} {output}"
        if len(os.fsencode(target.name)) > _LONGEST_NAME:
            cause = f"its name is longer than {_LONGEST_NAME} bytes, and names beside it are longer"
            raise UsageError(f"{what:.200}", cause, "choose a shorter name")
        if target.name.endswith(_RESERVED):
            cause = (
                f"{target.name.rpartition('.')[2]} files belong to the output of the name before"
            )
            raise UsageError(what, cause, "name another place")
        if target in written:
            raise UsageError(what, f"{written[target]} is the same file", "name another place")
        for other, name in written.items():
            if target in other.parents or other in target.parents:
                cause = f"one would be a part of the other ({name} {other})"
                raise UsageError(what, cause, "name places beside each other")
        written[target] = flag
        if target in (Path("/"), Path(os.environ.get("HOME", "/")).resolve()):
            raise UsageError(what, "a stage replaces its output's folder", "name one below it")
        for path, name in read.items():
            if path == target and not in_place:
                raise UsageError(what, f"it is an input too ({name})", "name another place")
            if target in path.parents:
                raise UsageError(what, f"an input lies in it ({name})", "name another place")
            if path in target.parents and _counts_whole(path, name, target):
                cause = f"it lies in an input ({name}), and would be a part of it"
                raise UsageError(what, cause, "name another place")


def state(path: Path) -> tuple[int, int] | None:
    """What tells an output from one that took its place or went on; None without one."""
    if not path.exists():
        return None
    record = path / manifest.FILE
    written = record if record.is_file() else path
    # The folder's own time changes with a lock in it.
    return path.stat().st_ino, 0 if written.is_dir() else written.stat().st_mtime_ns


def _counts_whole(path: Path, name: str, output: Path) -> bool:
    """Whether all files below ``path``, an input's folder, are read or recorded as the input.

    Args:
        name: its flag and value; another flag's value may happen to be a folder's name.
    """
    if output.suffix == ".json" or (path / manifest.FILE).is_file():
        return False
    return name.split()[0].endswith(("-load", "-path", "-dataset", "-files", "-name"))


def _resolved(path: Path) -> Path:
    """Without links; unlike ``Path.resolve`` it takes links that lead to themselves."""
    return Path(os.path.realpath(path))


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no path at all: too long, or with a NUL
        return False


def _require_no_link(path: Path, what: str) -> None:
    """Renaming an output into place would replace the link, and leave what it leads to."""
    if path.is_symlink():
        raise UsageError(what, f"it is a symbolic link to {path.readlink()}", "name its target")


def writable(path: Path, what: str = "") -> None:
    """Raise UsageError unless this user may create ``path``, a file or a folder.

    An output is renamed into place, so the folder above it counts even where it exists.

    Args:
        what: the output in a message (``output <path>``).
    """
    _require_no_link(path, what or f"output {path}")
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


def disk_space(output: Path, needed: int) -> None:
    """Raise UsageError unless the file system of ``output`` has ``needed`` bytes free."""
    parent = nearest_existing(output if output.is_dir() else output.absolute().parent)
    if not parent.is_dir():
        raise UsageError(f"output {output}", f"{parent} is a file", "name another place")
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise UsageError(
            f"output {output}",
            f"about {report.number_of_bytes(needed)} are needed and "
            f"{report.number_of_bytes(free)} are free on {parent}",
            "free some space, or set MLM_WORK_DIR to a larger disk",
        )


def full_disk(error: Exception, paths: Iterable[Path]) -> UsageError | None:
    """The error to raise for one that a full disk caused; None for any other.

    Args:
        error: of a write; torch's do not tell the cause, so a disk without room counts as that.
        paths: the outputs.
    """
    if isinstance(error, UsageError):
        return None
    paths = list(paths)
    if cut := _at_limit(paths):
        remedy = "raise the limit (ulimit -f), or ask who set it, and start this again"
        return UsageError(f"output {cut}", "it reached the largest size of a file", remedy)
    cause: BaseException | None = error
    while cause is not None and getattr(cause, "errno", None) not in files.FULL:
        cause = cause.__cause__ or cause.__context__
    free = {path: shutil.disk_usage(nearest_existing(path.absolute())).free for path in paths}
    full = [path for path, left in free.items() if left < _NO_ROOM]
    says_itself = isinstance(error, OSError) and error.errno
    if cause is None and (says_itself or not full):
        return None
    return UsageError(
        f"output {', '.join(map(str, full or free))}",
        f"a disk became full: {first_line(cause or error)}",
        "free some space and start this again; what was finished is untouched",
    )


def _at_limit(paths: Iterable[Path]) -> Path | None:
    """A file of an unfinished output that has the size at which the user's limit ends files."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY:
        return None
    made = [files.incomplete(path) for path in paths]
    every = (each for path in made for each in ([path] if path.is_file() else files.tree(path)))
    return next((each for each in every if each.stat().st_size >= limit), None)


def thread_failed(failure: threading.ExceptHookArgs) -> None:
    """For ``threading.excepthook``: one line where a thread, such as TensorBoard's, finds no room.

    The stage itself stops at the next file that it writes, with the output's name.
    """
    error = failure.exc_value
    if isinstance(error, OSError) and error.errno in files.FULL:
        print(f"a disk became full: {first_line(error)}", file=sys.stderr)
    else:
        threading.__excepthook__(failure)


def _what_lies_there(folder: Path) -> str:
    """What an occupied output folder holds: why it is not overwritten."""
    content = manifest.read(folder)
    if content is None:
        return "it is not empty, and no stage's manifest says what it is"
    made = f"it holds the output of {content.get('stage')}, finished {content.get('finished')}"
    if manifest.damaged_outputs(folder, content):
        return f"{made}, now damaged"
    if content.get("command") == redaction.command():
        return f"{made}, complete, made by this same command"
    return f"{made}, complete, made by: {content.get('command')}"
