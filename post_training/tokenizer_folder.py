"""What a tokenizer folder holds, read without a tokenizer library. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "tekken.json")


def present(folder: Path) -> bool:
    """Whether ``folder`` has a file from which transformers can make a tokenizer."""
    return any((folder / name).is_file() for name in (*FILES, "tiktoken.model", "vocab.txt"))


def vocabulary(folder: Path) -> int | None:
    """Highest token id plus one, from ``tokenizer.json``; None where there is none to read."""
    path = folder / "tokenizer.json"
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = [len(vocabulary) - 1]
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    ids += [token["id"] for token in content.get("added_tokens", [])]
    return max(ids) + 1
