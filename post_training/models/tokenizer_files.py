"""What a tokenizer folder holds, read without a tokenizer library or torch."""

from __future__ import annotations

from pathlib import Path

from post_training.common import files, inputs
from post_training.common.errors import UsageError

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "tekken.json")


def present(folder: Path) -> bool:
    """Whether ``folder`` has a file from which transformers can make a tokenizer."""
    return any((folder / name).is_file() for name in (*FILES, "tiktoken.model", "vocab.txt"))


def vocabulary(folder: Path) -> int | None:
    """Highest token id plus one, from ``tokenizer.json``; None without one."""
    if not (folder / "tokenizer.json").is_file():
        return None
    content = files.read_json_object(folder / "tokenizer.json")
    vocabulary = content.get("model", {}).get("vocab", {})
    ids = [len(vocabulary) - 1]
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    ids += [token["id"] for token in content.get("added_tokens", [])]
    return max(ids) + 1


def check(value: str, option: str = "--tokenizer-model") -> None:
    """Check a tokenizer folder; a hub name can only be checked for its form."""
    if inputs.is_hub_name(value):
        return
    folder = Path(value)
    inputs.check_folder(folder, f"{option} {folder}", "name a folder with tokenizer.json")
    if not present(folder):
        raise UsageError(
            f"{option} {folder}",
            f"it has none of {', '.join(FILES)}",
            "name the folder of the model's tokenizer in TOKENIZER_MODEL",
        )
