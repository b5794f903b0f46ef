"""Which data a stage read: its files and their hashes, for the run's record. No torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from post_training.common import inputs, manifest
from post_training.common.errors import UsageError
from post_training.data import records

_MOST_FILES = 64  # that are hashed each; a folder of more is known by names, sizes and times


@contextlib.contextmanager
def reading(role: str, places: Sequence[tuple[str, str]]) -> Iterator[list[dict[str, Any]]]:
    """In the context ``places`` are read. Gives what a manifest says of them as its inputs.

    Args:
        role: in the manifest, such as ``data``.
        places: local path or hub name, and the option that named it.

    Raises:
        UsageError: at the end, if one of them was replaced meanwhile.
    """
    found = [each for place, option in places for each in _described(role, place, option)]
    yield found
    for entry in found:
        manifest.require_unchanged(entry, entry["path"], "read")


def replaced(place: str) -> UsageError:
    """The error for data that was changed between two looks at it."""
    return UsageError(
        place,
        "it was changed or replaced while it was read",
        "run again when nothing writes to it",
    )


def _described(role: str, place: str, option: str) -> list[dict[str, Any]]:
    if not records.is_local(place):
        return [{"role": role, "path": place}]
    path = inputs.expanded(place)
    files = records.list_files(path, option)
    if len(files) > _MOST_FILES:
        return [manifest.describe_input(role, path)]
    return [manifest.describe_input(role, file) for file in files]
