"""Hugging Face folders: resolve a name, read the configuration, copy what travels with weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from post_training.common import files, forms, inputs, regular
from post_training.common.errors import UsageError
from post_training.distributed import placement

# Files of a model folder, other than weights, that are needed to use the model.
SMALL_FILES = tuple(
    """
    config.json generation_config.json preprocessor_config.json LICENSE NOTICE
    tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json added_tokens.json
    chat_template.jinja chat_template.json vocab.json merges.txt vocab.txt
    spiece.model tekken.json tiktoken.model processor_config.json video_preprocessor_config.json
    README.md
    """.split()  # README.md states the license; of an export it is another (export/model_card.py)
)
_CHAT_TEMPLATES = "additional_chat_templates"
QUANTIZATION = "hf_quant_config.json"  # ModelOpt's; read, and never copied
ADAPTER = "adapter_config.json"  # PEFT's
_resolved: dict[str, Path] = {}
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")


def resolve(name_or_path: str, *, weights: bool, trust_remote_code: bool = False) -> Path:
    """The local folder of a model; a hub name is downloaded. A collective call.

    ``weights`` are fetched if they are needed too, and Python files with ``trust_remote_code``.
    Rank 0 downloads, then the first rank of each other machine whose cache has not got it.
    UsageError if the hub cannot be reached or does not know the name.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    from post_training.distributed import collectives

    patterns = [*SMALL_FILES, QUANTIZATION, ADAPTER, *(_WEIGHT_PATTERNS if weights else ())]
    if trust_remote_code:
        patterns.append("*.py")
    expected = (HfHubHTTPError, LocalEntryNotFoundError, OSError)

    def not_provided(reason: str) -> UsageError:
        return UsageError(
            f"model {name_or_path}",
            f"it is no local folder, and the hub did not provide it: {reason}",
            "name a local folder in HF_MODEL_CKPT; for a gated model set HF_TOKEN",
        )

    here = placement.placement()
    turns = (here.rank == 0, here.rank > 0 and here.local_rank == 0, here.local_rank > 0)
    for number, mine in enumerate(turns):
        with collectives.fail_together(expected, not_provided):
            if mine:
                found = snapshot_download(
                    name_or_path, allow_patterns=patterns, local_files_only=number == 2
                )
    _resolved[name_or_path] = Path(found)
    return Path(found)


def resolved(name: str) -> Path | None:
    """The folder of a hub name that this process has resolved before; None otherwise."""
    return _resolved.get(name)


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder."""
    return files.read_json_object(folder / "config.json")


def known_config(name_or_path: str) -> dict[str, Any] | None:
    """``config.json`` of a folder, or of a hub name that was downloaded before; no network."""
    path = Path(name_or_path) / "config.json"
    found = path if path.is_file() else inputs.cached(name_or_path, path.name)
    return files.read_json_object(found) if found else None


class _TextEndTokens(TypedDict, total=False):
    eos_token_id: int | list[int] | None


class _EndTokens(_TextEndTokens, total=False):
    text_config: _TextEndTokens | None


def end_tokens(folder: Path) -> list[int]:
    """Ids that end an answer, of ``generation_config.json``.

    As in transformers, a model without that file has those of its ``config.json``; one that sees
    images has them in ``text_config``.
    """
    path = folder / "generation_config.json"
    path = path if regular.is_file(path) else folder / "config.json"
    content: _EndTokens = forms.read_json(path, _EndTokens, "file", "copy or download it again")
    stated = content.get("eos_token_id", (content.get("text_config") or {}).get("eos_token_id"))
    return [stated] if isinstance(stated, int) else stated or []


@dataclass(frozen=True)
class SmallFiles:
    """What travels with a checkpoint so that it can be exported again: no weights.

    With ``python_files`` the model's own code travels too. ``config`` takes the place of the
    folder's ``config.json``: a pruned model's. ``weights`` is the model's folder where it is
    another: tensors that are not converted come from there.
    """

    folder: Path
    python_files: bool = False
    config: Mapping[str, Any] | None = None
    weights: Path | None = None

    def copy_to(self, target: Path) -> None:
        """Write the files into ``target``, which exists."""
        paths = [self.folder / name for name in SMALL_FILES if (self.folder / name).is_file()]
        if self.python_files:
            paths += self.folder.glob("*.py")
        for path in paths:
            shutil.copyfile(path, target / path.name)
        if (self.folder / _CHAT_TEMPLATES).is_dir():
            shutil.copytree(self.folder / _CHAT_TEMPLATES, target / _CHAT_TEMPLATES)
        config = self.config
        if config is None and (self.folder / "config.json").is_file():
            config = read_config(self.folder)
            if "quantization_config" not in config:
                return
            # The weights that they travel with were dequantized.
            config = {key: each for key, each in config.items() if key != "quantization_config"}
        if config is not None:
            files.write_json(target / "config.json", dict(config))
