"""``--prune-export-config``: the sizes of the pruned model, by name. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from post_training.common.errors import UsageError, suggest
from post_training.pruning.space import MEANINGS, OPTION, Dimension


def read(text: str) -> dict[str, Any]:
    """The JSON object of --prune-export-config: the text itself, or the file that it names.

    Raises:
        UsageError: if it is not JSON or no object, or a key is unknown; the nearest are named.
    """
    shown = f"{OPTION} {text}"
    example = """'{"hidden_size": 3072, "num_layers": 32}'"""
    if not text.lstrip().startswith("{"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise UsageError(
                shown, "it is neither a JSON object nor a file", f"quote it: {OPTION} {example}"
            )
        text = path.read_text(encoding="utf-8")
    try:
        content = json.loads(text, object_pairs_hook=_without_repetition)
    except ValueError as error:
        raise UsageError(shown, f"it is not JSON: {error}", f"quote it: {OPTION} {example}") from (
            error
        )
    if not isinstance(content, dict):
        raise UsageError(shown, "it is not a JSON object", f"write {OPTION} {example}")
    for key in content:
        if key not in MEANINGS:
            raise UsageError(
                f"{OPTION} {key}",
                "unknown hyper-parameter",
                suggest(key, MEANINGS) or f"known are {', '.join(MEANINGS)}",
            )
    return content


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


def check(content: Mapping[str, Any], allowed: Mapping[str, Dimension]) -> dict[str, int]:
    """The values that change something.

    Raises:
        UsageError: unless every value is allowed and something is pruned.
    """
    for name, value in content.items():
        allowed[name].check(value)
    # Widths that stay as they are would be sorted for nothing.
    changed = {name: value for name, value in content.items() if value != allowed[name].original}
    if not changed:
        raise UsageError(
            f"{OPTION} {json.dumps(dict(content))}",
            "it leaves everything as it is",
            f"give smaller values, e.g. {example(allowed)}",
        )
    return changed


def example(allowed: Mapping[str, Dimension]) -> str:
    """A configuration that prunes a little, for messages."""
    for name in ("ffn_hidden_size", "moe_ffn_hidden_size", "hidden_size", "num_layers"):
        if len(allowed[name].choices) > 1:
            return f"""{OPTION} '{{"{name}": {allowed[name].choices[-2]}}}'"""
    return f"another model than this: no value of {OPTION} is smaller"
