"""Usage errors: what a person did that cannot work, why, and what to do about it.

A usage error ends a stage with exit code 2 and one message. Anything else that goes wrong is an
ordinary exception with its traceback. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Iterable
from typing import NoReturn

EXIT_CODE = 2


class UsageError(Exception):
    """A mistake in the command line, the environment or an input file.

    Args:
        what: the option or path *and its value*, e.g. ``--load /data/x``.
        cause: why it cannot work.
        remedy: what to do instead.
    """

    def __init__(self, what: str, cause: str, remedy: str) -> None:
        super().__init__(what, cause, remedy)
        self.what = what
        self.cause = cause
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.what}\n  cause: {self.cause}\n  remedy: {self.remedy}"


def exit_with_usage_error(error: UsageError) -> NoReturn:
    """Print ``error`` to stderr and leave with exit code 2.

    Of the processes that a launcher started on one machine, only the first prints: all of them
    see the same mistake.
    """
    if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
        print(f"error: {error}", file=sys.stderr)
    sys.exit(EXIT_CODE)


def first_line(error: BaseException) -> str:
    """What an exception says, in one line: its first, or its type where it says nothing."""
    # A KeyError's own text is its argument in quotes.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Up to ``count`` of ``known`` that look most like ``name``, best first; case is ignored.

    Similarity is difflib's (Ratcliff/Obershelp); names that contain ``name`` count as similar.
    """
    by_lower: dict[str, str] = {}
    for candidate in known:
        by_lower.setdefault(candidate.lower(), candidate)
    wanted = name.lower()
    found = difflib.get_close_matches(wanted, by_lower, n=count, cutoff=0.6)
    found += [key for key in by_lower if len(wanted) > 2 and wanted in key and key not in found]
    return [by_lower[key] for key in found[:count]]


def suggest(name: str, known: Iterable[str]) -> str:
    """``Did you mean: a, b?`` with the names of ``known`` nearest to ``name``, or ``""``."""
    found = nearest(name, known)
    return f"Did you mean: {', '.join(found)}?" if found else ""
