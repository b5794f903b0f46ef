"""Values of a manifest as they are wanted: of another type they count as absent.

A manifest may be of a stage that this version does not know, or of none: nothing here raises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_LARGEST = 1e100


def _at(content: Any, path: Sequence[str]) -> Any:
    for name in path:
        if not isinstance(content, Mapping):
            return None
        content = content.get(name)
    return content


def number(content: Any, *path: str) -> float | None:
    """A number, neither infinite nor as good as that."""
    found = _at(content, path)
    if isinstance(found, bool) or not isinstance(found, int | float):
        return None
    # Sums and ratios of larger ones, which nothing measures, would not be finite.
    return float(found) if -_LARGEST < found < _LARGEST else None


def numbers(content: Any, *path: str) -> list[float]:
    """A list of numbers; empty if one of them is none."""
    found = [number(each) for each in sequence(content, *path)]
    return [each for each in found if each is not None] if None not in found else []


def text(content: Any, *path: str) -> str:
    """A string; empty where there is none."""
    found = _at(content, path)
    return found if isinstance(found, str) else ""


def mapping(content: Any, *path: str) -> Mapping[str, Any]:
    """An object; empty where there is none."""
    found = _at(content, path)
    return found if isinstance(found, Mapping) else {}


def sequence(content: Any, *path: str) -> list[Any]:
    """A list; empty where there is none."""
    found = _at(content, path)
    return found if isinstance(found, list) else []


def interval(content: Any, *path: str) -> tuple[float, float] | None:
    """The two ends of an interval, the lower first."""
    found = numbers(content, *path)
    return (found[0], found[1]) if len(found) == 2 and found[0] <= found[1] else None
