"""transformers' model of an exported folder whose weights are integers, decoded first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tools
import torch
from safetensors.torch import save_file

from post_training.export import stacked_experts
from post_training.models.families import registry as families

Decode = Callable[[Mapping[str, torch.Tensor], str], torch.Tensor | None]


def transformers_model(folder: Path, work: Path, decode: Decode) -> Any:
    """The model in float32, from a plain folder that is written to ``work``.

    Args:
        decode: of the folder's tensors and a linear's name; None where it is not quantized.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    stored = dict(tools.tensors(folder))
    weights = {key: value for key, value in stored.items() if "packed" not in key}
    for module in {key.rpartition(".")[0] for key in stored}:
        if (decoded := decode(stored, module)) is not None:
            weights[f"{module}.weight"] = decoded
    work.mkdir(exist_ok=True)
    # transformers has Granite's experts in one tensor alone.
    stacked = families.FAMILIES[config.architectures[0]].stacked
    weights = stacked_experts.joined(weights, stacked)
    plain = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(plain, work / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(work)
    return AutoModelForCausalLM.from_pretrained(work, dtype=torch.float32).eval()
