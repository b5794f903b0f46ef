"""JSON as text: what is not JSON, or says a thing twice, is refused. No torch."""

from __future__ import annotations

import json
from typing import Any

from post_training.common import regular


class HalfCharacterError(ValueError):
    """Half of a surrogate pair, which JSON and YAML can spell (``\\ud800``) and no text holds."""


def parse(text: str, **options: Any) -> Any:
    """What JSON text holds, read by ``json.loads`` with these options.

    Raises:
        ValueError: if it is not JSON, has a name twice, or half a character (HalfCharacterError).
        RecursionError: if it is nested too deep.
    """
    content = json.loads(text, **{"object_pairs_hook": regular.unique, **options})
    require_whole_characters(text, content)
    return content


def require_whole_characters(text: str, content: Any) -> None:
    """Raise HalfCharacterError for one in ``content``, as read from ``text``: no file has one."""
    if "\\ud" not in text.lower():
        return
    try:
        json.dumps(content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        at = text.lower().find(half)
        line, column = text.count("\n", 0, at), at - text.rfind("\n", 0, at)
        where = f"line {line + 1}" if "\n" in text.rstrip() else f"column {column}"
        raise HalfCharacterError(f"it has {half} without its other half ({where})") from error
