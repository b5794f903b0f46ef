"""How a family refuses a value of ``config.json``."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

from post_training.common.errors import UsageError


class Refused(NamedTuple):
    """A key of ``config.json``, the only value that can be represented, what others mean."""

    key: str
    only: Any
    meaning: str


def refuse(what: str, cause: str, remedy: str = "convert another model of this family") -> NoReturn:
    """Raise UsageError about a value of ``config.json``."""
    raise UsageError(f"config.json: {what}", cause, remedy)
