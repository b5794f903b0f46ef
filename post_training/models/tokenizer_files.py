"""What a tokenizer folder holds, read without a tokenizer library or torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from post_training.common import files, forms, inputs, regular
from post_training.common.errors import UsageError

FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "tekken.json")


# Tokens of released tokenizers, by how the names of their models begin: Megatron-LM's confs state
# what the number is padded to, not the number.
PUBLISHED = {
    "DeepSeek-R1": 128_815,
    "DeepSeek-V2-Lite": 100_002,
    "DeepSeek-V3": 128_815,
    "Llama-3.": 128_256,
    "NVIDIA-Nemotron-": 131_072,
    "Nemotron-H-": 131_072,
    "Nemotron-Mini-": 256_000,
    "Qwen3-": 151_669,
}


# How many times as long the steps of a tokenizer may make a text. Released ones: 4 at most.
_GROWTH = 256


class _Model(TypedDict, total=False):
    vocab: dict[str, int] | list[Any]


class _Token(TypedDict):
    id: int


class _Tokenizer(TypedDict, total=False):
    model: _Model
    added_tokens: list[_Token]


def vocabulary(folder: Path) -> int | None:
    """Highest token id plus one, from ``tokenizer.json``; None without one."""
    if not regular.is_file(folder / "tokenizer.json"):
        return None
    path = folder / "tokenizer.json"
    content: _Tokenizer = forms.read_json(path, _Tokenizer, "file", "copy or download it again")
    vocabulary = content.get("model", {}).get("vocab", {})
    # A list (SentencePiece's unigrams) is in the order of the ids.
    ids = [len(vocabulary) - 1]
    if isinstance(vocabulary, dict):
        ids += vocabulary.values()
    ids += [token["id"] for token in content.get("added_tokens", [])]
    return max(ids) + 1


def check_growth(folder: Path) -> None:
    """Raise UsageError for a ``tokenizer.json`` whose steps, chained, make gigabytes of a line.

    The tokenizers library would abort the process for lack of memory. What a step adds is bounded
    from above: a pattern may match everywhere.
    """
    path = folder / "tokenizer.json"
    if not regular.is_file(path):
        return
    content = files.read_json_object(path, "file", "copy or download it again")
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        factor = _growth(content.get(part))
        if factor > _GROWTH:
            raise UsageError(
                f"file {path}",
                f"its {part} can make a text {factor:.3g} times as long",
                f"replace it by the model's own file; up to {_GROWTH} times is read",
            )


def _growth(part: Any) -> float:
    """How many times as long the steps of a part of ``tokenizer.json`` may make a text."""
    found, steps = 1.0, [part]
    while steps and found <= _GROWTH:
        step = steps.pop()
        if not isinstance(step, dict):
            continue  # the tokenizers library refuses it
        for name in ("normalizers", "pretokenizers", "decoders"):
            further = step.get(name)
            steps += further if isinstance(further, list) else []
        if step.get("type") == "ByteLevel":
            found *= 2  # a byte becomes a character of up to two bytes
        elif step.get("type") == "Replace":
            pattern, content = step.get("pattern"), str(step.get("content"))
            literal = str(pattern.get("String") or "") if isinstance(pattern, dict) else ""
            added = len(content.encode(errors="replace"))
            found *= max(
                1.0, added / len(literal.encode(errors="replace")) if literal else 1 + added
            )
    return found


def published(location: str) -> int | None:
    """Tokens of a released model's tokenizer by its hub name or folder; None if not known."""
    name = Path(location).name
    return next((n for begin, n in PUBLISHED.items() if name.startswith(begin)), None)


def check(value: str) -> None:
    """Raise UsageError for a folder without a tokenizer; a hub name has none to check."""
    if inputs.is_hub_name(value):
        return
    folder = Path(value)
    inputs.check_folder(folder, f"--tokenizer-model {folder}", "name a folder with tokenizer.json")
    if not any((folder / name).is_file() for name in (*FILES, "tiktoken.model", "vocab.txt")):
        raise UsageError(
            f"--tokenizer-model {folder}",
            f"it has none of {', '.join(FILES)}",
            "name the folder of the model's tokenizer in TOKENIZER_MODEL",
        )
    check_growth(folder)
