"""Checks of single flags, before the work. No torch.

Those with the arguments (flag, value) are checks of ``flags.flag``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from post_training.common.errors import UsageError, suggest


def required(option: str, value: str | None, variable: str | None = None) -> str:
    """``value``; where there is none, an error names the flag and the launcher's variable."""
    if not value:
        remedy = f"set {variable} or {option}" if variable else f"give {option}"
        raise UsageError(f"{option} (not given)", "it is needed", remedy)
    return value


def at_least(least: int, remedy: str = "") -> Callable[[str, float], None]:
    """A check that a number is finite and not below ``least``; ``remedy`` says what to give."""

    def check(option: str, value: float) -> None:
        if not least <= value < math.inf:  # isfinite cannot take a huge int
            cause = f"it is less than {least}" if value < least else "it is not a finite number"
            raise UsageError(f"{option} {value}", cause, remedy or f"{least} or more")

    return check


def positive(option: str, value: float) -> None:
    """Raise UsageError unless the number is finite and above 0."""
    if not 0 < value < math.inf:
        cause = "it is not positive" if value <= 0 else "it is not a finite number"
        raise UsageError(f"{option} {value}", cause, "give a number above 0")


def positive_in_file(name: str, value: float) -> None:
    """The same for a number of a file, in which an integer may have any number of digits."""
    try:
        positive(name, float(value))
    except OverflowError as error:
        raise UsageError(f"{name} {value!r:.40}", "it is too large", "give e.g. 1") from error


def fraction(option: str, value: float) -> None:
    """Raise UsageError unless the number is from 0 to 1."""
    if not 0 <= value <= 1:
        raise UsageError(f"{option} {value}", "it is not from 0 to 1", "give e.g. 0.5")


def below_one(option: str, value: float) -> None:
    """Raise UsageError unless the number is from 0 to below 1."""
    if not 0 <= value < 1:
        raise UsageError(f"{option} {value}", "it is not from 0 to below 1", "give e.g. 0.9")


def positive_fraction(option: str, value: float) -> None:
    """Raise UsageError unless the number is above 0 and at most 1."""
    if not 0 < value <= 1:
        raise UsageError(f"{option} {value}", "it is not above 0 and at most 1", "give 0 < x <= 1")


def no_context_parallelism(size: int) -> None:
    """Raise UsageError where CP is set: the stages here compute whole sequences on each rank."""
    if size > 1:
        raise UsageError(f"CP={size}", "sequences are not divided here", "CP=1; raise DP")


def check_choice(option: str, value: str, known: list[str]) -> None:
    """Raise UsageError with the nearest of the ``known`` names unless ``value`` is one."""
    if value not in known:
        raise UsageError(
            f"{option} {value}",
            "unknown name",
            suggest(value, known) or f"known are {', '.join(known)}",
        )
