"""The flags that say how many sequences are computed at a time: a number, or ``auto``. No torch."""

from __future__ import annotations

from typing import Any

from post_training.config.checks import at_least
from post_training.config.flags import flag

AUTO = "auto"
# The value of such a flag.
BatchSize = int | str


def number_or_auto(text: str) -> BatchSize:
    """The value that a command line spells."""
    return text if text == AUTO else int(text)


def check(option: str, value: BatchSize) -> None:
    """Raise UsageError unless the value is ``auto`` or a positive number."""
    if isinstance(value, int):
        at_least(1, f"1 or more, or {AUTO}")(option, value)


def batch_flag(what: str) -> Any:
    """A dataclass field that is such a flag; ``what`` is computed at a time."""
    return flag(
        AUTO,
        metavar="N",
        type=number_or_auto,
        check=check,
        help=f"{what}; {AUTO}: as many as the free memory takes (%(default)s)",
    )
