"""Folders that look like models: enough for the checks before the work."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def write_model(folder: Path, config: dict[str, Any] | None = None, **tensors: list[int]) -> Path:
    """A model folder with one safetensors file of zeros in bfloat16, by name and shape."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    header, end = {}, 0
    for name, shape in (tensors or {"model.norm.weight": [64]}).items():
        begin, size = end, 2
        for length in shape:
            size *= length
        end = begin + size
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)  # a hole in the file, whatever the size
    return folder


def write_checkpoint(folder: Path, tracker: str = "release", **manifest: Any) -> Path:
    (folder / "release").mkdir(parents=True)
    (folder / "release" / "metadata.json").write_text("{}")
    (folder / "release" / "__0_0.distcp").write_bytes(b"x")
    (folder / "latest_checkpointed_iteration.txt").write_text(tracker)
    if manifest:
        (folder / "run.json").write_text(json.dumps({"format": 1, "outputs": [], **manifest}))
    return folder
