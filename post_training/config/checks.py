"""Checks of single flags, before the work. No torch."""

from __future__ import annotations

import argparse

from post_training.common.errors import UsageError, suggest


def required(args: argparse.Namespace, option: str, variable: str) -> str:
    """The value of ``option``; an error names it and the launcher's variable."""
    value = getattr(args, option.lstrip("-").replace("-", "_"))
    if not value:
        raise UsageError(f"{option} (not given)", "it is needed", f"set {variable} or {option}")
    return str(value)


def check_choice(option: str, value: str, known: list[str]) -> None:
    """Raise UsageError with the nearest of the ``known`` names unless ``value`` is one."""
    if value not in known:
        raise UsageError(
            f"{option} {value}",
            "unknown name",
            suggest(value, known) or f"known are {', '.join(known)}",
        )
