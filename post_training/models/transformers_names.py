"""Names of models that transformers does not know, though it has their architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, DeepseekV3Config


class KimiK2Config(DeepseekV3Config):
    """Kimi-K2's files are DeepSeek-V3's under another ``model_type``."""

    model_type = "kimi_k2"


def register() -> None:
    """Let transformers read such a ``config.json``, without the model's own code."""
    AutoConfig.register(KimiK2Config.model_type, KimiK2Config, exist_ok=True)


def config(folder: Path) -> Any:
    """transformers' configuration of a model folder, under the name that has the layers."""
    register()
    found = AutoConfig.from_pretrained(folder)
    if isinstance(found, KimiK2Config):
        stated = {key: value for key, value in found.to_dict().items() if key != "model_type"}
        return DeepseekV3Config(**stated)
    return found
