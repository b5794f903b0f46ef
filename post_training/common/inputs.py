"""Input paths from a command line: path or hub name, and whether it exists. No torch."""

from __future__ import annotations

import re
from pathlib import Path

from post_training.common import files
from post_training.common.errors import UsageError, suggest

_HUB_NAME = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def is_hub_name(value: str) -> bool:
    """Whether ``value`` means a repository on the hub: ``org/name``, and no such path exists.

    A value that starts with ``.``, ``/`` or ``~``, or has several slashes, is a path.
    """
    return _HUB_NAME.fullmatch(value) is not None and not Path(value).exists()


def expanded(path: str | Path) -> Path:
    """The path, a home for ``~`` or ``~user`` in front; as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cached(hub_name: str, file: str) -> Path | None:
    """A file of a hub name that was downloaded before; None otherwise. No network."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_name, file) if is_hub_name(hub_name) else None
    return Path(found) if isinstance(found, str) else None


def check_folder(folder: Path, what: str, remedy: str) -> None:
    """Raise UsageError unless ``folder`` exists and is not empty."""
    files.recover(folder)
    if not folder.exists():
        parent = nearest_existing(folder)
        names = [each.name for each in parent.iterdir()] if parent == folder.parent else []
        raise UsageError(
            what, "there is no such folder", f"{suggest(folder.name, names)} {remedy}".strip()
        )
    if not folder.is_dir():
        raise UsageError(what, "it is a file, not a folder", remedy)
    if not any(folder.iterdir()):
        raise UsageError(what, "the folder is empty", remedy)


def nearest_existing(path: Path) -> Path:
    """The nearest parent (or the path itself) that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
