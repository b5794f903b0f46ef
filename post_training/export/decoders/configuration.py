"""``hf_quant_config.json``: how a folder says that its weights are stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from post_training.common import files, forms

FILE = "hf_quant_config.json"


class _Layer(TypedDict, total=False):
    quant_algo: str
    group_size: int


class _Said(TypedDict, total=False):
    quant_algo: str | None
    kv_cache_quant_algo: str | None
    exclude_modules: list[str] | None
    quantized_layers: dict[str, _Layer] | None
    group_size: int | None


class _File(TypedDict):
    quantization: _Said


def read(folder: Path) -> dict[str, Any]:
    """What the file says, all of it; empty without one. UsageError for another form."""
    if not (folder / FILE).is_file():
        return {}
    content = files.read_json_object(folder / FILE, "file", "export the model again")
    forms.parse(content, _File, f"file {folder / FILE}", "export the model again")
    said: dict[str, Any] = content["quantization"]
    return said
