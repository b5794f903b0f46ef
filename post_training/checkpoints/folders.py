"""Checks of model folders: Hugging Face models and Megatron checkpoints. No torch.

Each raises a UsageError that names the option with its value, the cause and the remedy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from post_training.checkpoints import torch_dist
from post_training.common import inputs, safetensors_index
from post_training.common.errors import UsageError
from post_training.common.files import read_json_object
from post_training.common.inputs import is_hub_name
from post_training.models import families


def model_source(value: str, option: str = "--pretrained-model-path") -> dict[str, Any] | None:
    """Check a Hugging Face folder and return its ``config.json``; None for a hub name."""
    return None if is_hub_name(value) else model_folder(Path(value), option)


def model_folder(
    folder: Path, option: str = "--pretrained-model-path", *, weights: bool = True
) -> dict[str, Any]:
    """Check a Hugging Face model folder; returns the content of its ``config.json``.

    Args:
        folder: the folder.
        option: the flag that named it, for messages.
        weights: whether it must hold weights: safetensors, complete, not quantized.

    Raises:
        UsageError: for anything that is missing, broken, or cannot be converted.
    """
    what = f"{option} {folder}"
    inputs.check_folder(folder, what, "name a Hugging Face folder, or a hub name such as org/name")
    path = folder / "config.json"
    if not path.is_file():
        remedy = "name the folder of a Hugging Face model"
        if (folder / torch_dist.TRACKER).is_file():
            remedy = "it is a Megatron checkpoint: name it in MLM_MODEL_CKPT (--load)"
        raise UsageError(what, "it has no config.json", remedy)
    config = read_json_object(path)
    if not weights:
        return config
    families.refuse_quantized(config, str(path))
    if (folder / "hf_quant_config.json").is_file():
        quantization = read_json_object(folder / "hf_quant_config.json").get("quantization", {})
        families.refuse_quantized(
            {"quantization_config": {"quant_method": "modelopt", **quantization}},
            str(folder / "hf_quant_config.json"),
        )
    if not any((folder / n).is_file() for n in (safetensors_index.INDEX, safetensors_index.SINGLE)):
        _no_safetensors(folder, what)
    safetensors_index.read(folder)
    return config


def checkpoint_folder(folder: Path, option: str = "--load") -> Path:
    """Check a Megatron checkpoint; returns its folder of weights (``release``, ``iter_...``).

    Raises:
        UsageError: if it is missing, no checkpoint, or its weights are incomplete.
    """
    what = f"{option} {folder}"
    inputs.check_folder(folder, what, "name the folder that a stage saved")
    tracker = folder / torch_dist.TRACKER
    if not tracker.is_file() and not (folder / "metadata.json").is_file():
        remedy = "name the folder that a stage saved, or one of its iterations"
        if (folder / "config.json").is_file():
            remedy = "it is a Hugging Face folder: name it in HF_MODEL_CKPT, or convert it first"
        raise UsageError(what, f"it has neither {torch_dist.TRACKER} nor metadata.json", remedy)
    if tracker.is_file():
        text = tracker.read_text(encoding="utf-8", errors="replace").strip()
        if text != torch_dist.RELEASE and not text.isdecimal():
            raise UsageError(
                f"{what}: {torch_dist.TRACKER} says {text[:40]!r}",
                "neither 'release' nor an iteration number",
                "write the name of an iteration that is there into it",
            )
    found = torch_dist.iteration_folder(folder)
    if not any(found.glob("*.distcp")):
        raise UsageError(what, f"{found} has no weights (*.distcp)", "copy or make it again")
    return found


def _no_safetensors(folder: Path, what: str) -> None:
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
    if pickled:
        raise UsageError(
            what,
            f"its weights are pickled ({pickled[0]}): loading them could run any code",
            "save the model as safetensors: transformers' save_pretrained does",
        )
    raise UsageError(
        what,
        f"it has neither {safetensors_index.SINGLE} nor {safetensors_index.INDEX}",
        "download the weights too, or name a folder that has them",
    )
