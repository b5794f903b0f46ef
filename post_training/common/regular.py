"""Files that are read whole: what is no file, or never ends, is refused before it is read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from post_training.common.errors import UsageError

_LARGEST = 1 << 30  # bytes; indexes and tokenizers take a hundredth of it


def is_file(path: Path) -> bool:
    """Whether there is a file; UsageError where something else has its name.

    What is there and cannot be read, such as a link to nowhere, must not count as absent.
    """
    if path.is_file():
        return True
    if os.path.lexists(path):
        cause = "it is no file, or a link to none"
        raise UsageError(f"file {path}", cause, "copy or download it again")
    return False


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, for ``json.loads``; ValueError where a name has two values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} is there twice in one object")
    return found


def read_text(path: Path) -> str:
    """Text of a file that is read whole.

    Raises:
        OSError: if there is none, or it is a pipe or a device, which may never end.
        ValueError: if it is no UTF-8, or too large to be what is expected.
    """
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a regular file", str(path))
    if status.st_size > _LARGEST:
        raise ValueError(f"it has {status.st_size:,} bytes, and at most {_LARGEST:,} are read")
    return path.read_text(encoding="utf-8")


def lines(stream: TextIO) -> Iterator[str]:
    """The lines of a text file. What is no text, a hole in a file too, has NULs and no line ends.

    Raises:
        OSError: if it has; the file would be read into memory to its end.
    """
    parts: list[str] = []
    while part := stream.readline(1 << 20):
        if "\0" in part:
            raise OSError("it holds NUL characters, which no text has")
        parts.append(part)
        if part.endswith("\n"):
            yield "".join(parts)
            parts.clear()
    if parts:
        yield "".join(parts)
