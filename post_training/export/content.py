"""What an exported folder says of itself, before a tensor is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from post_training.common import files, safetensors_index
from post_training.common.safetensors_index import Entry
from post_training.export.decoders import configuration


class Content(NamedTuple):
    """``config.json``, ``hf_quant_config.json`` if there is one, and the tensors by name."""

    config: dict[str, Any]
    beside: dict[str, Any] | None
    tensors: dict[str, Entry]

    @classmethod
    def of(cls, path: Path) -> Content:
        """Of a complete folder; UsageError for a file of another form."""
        said = configuration.read(path)
        return cls(
            files.read_json_object(path / "config.json"),
            {"quantization": said} if said else None,
            safetensors_index.read(path),
        )
