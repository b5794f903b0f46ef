"""Numbers with units, as the command line spells them: ``6e9``, ``6B``, ``12 GiB``. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from post_training.common.errors import UsageError

COUNTS: Mapping[str, float] = {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
BYTES: Mapping[str, float] = {
    "": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def read(option: str, text: str, units: Mapping[str, float]) -> float:
    """A positive number with one of ``units``; UsageError for anything else."""
    found = re.fullmatch(r"([0-9.]+(?:e[+]?[0-9]+)?)\s*([a-z]*)", text.strip().lower())
    known = ", ".join(name.upper() for name in units if name)
    try:
        value = float(found[1]) * units[found[2]] if found else 0.0
    except (KeyError, ValueError):
        value = 0.0
    if not value or not math.isfinite(value):
        raise UsageError(f"{option} {text}", "it is not a positive number", f"6e9, or with {known}")
    return value
