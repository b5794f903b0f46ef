"""Hugging Face folders as ``--pretrained-model-path`` names them: what is refused. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypedDict

from post_training.checkpoints import huggingface, torch_dist
from post_training.common import forms, inputs, regular, safetensors_index
from post_training.common.errors import UsageError
from post_training.models.families import registry as families

EXPORTED = ("modelopt", "compressed-tensors")  # quant_method of an export
_EMBEDDINGS = (
    "model.embed_tokens.weight",
    *("backbone.embeddings.weight", "backbone.embedding.weight"),  # Nemotron-H
)


def model_config(folder: Path, option: str) -> dict[str, Any]:
    """The ``config.json`` of the folder that ``option`` names; UsageError without one."""
    what = f"{option} {folder}"
    inputs.check_folder(folder, what, "name a Hugging Face folder, or a hub name such as org/name")
    if not (folder / "config.json").is_file():
        remedy = "name the folder of a Hugging Face model"
        if (folder / torch_dist.TRACKER).is_file():
            remedy = "it is a Megatron checkpoint: name it in MLM_MODEL_CKPT (--load)"
        raise UsageError(what, "it has no config.json", remedy)
    if regular.is_file(folder / huggingface.ADAPTER):
        raise UsageError(
            what,
            f"it has {huggingface.ADAPTER}: a PEFT adapter, which transformers adds to the weights",
            "merge it into its model (peft's merge_and_unload) and save that, or delete the file",
        )
    return huggingface.read_config(folder)


class _Quantized(TypedDict):
    quantization: dict[str, Any]


def is_export(folder: Path) -> bool:
    """Whether its files say that its weights are stored as an export stores quantized ones."""
    declared = model_config(folder, "--pretrained-model-path").get("quantization_config")
    method = declared.get("quant_method") if isinstance(declared, dict) else None
    return method in EXPORTED or regular.is_file(folder / huggingface.QUANTIZATION)


def unquantized(folder: Path) -> dict[str, Any]:
    """The ``config.json`` of a model; UsageError if it, or the file beside it, says quantized."""
    config = model_config(folder, "--pretrained-model-path")
    families.refuse_quantized(config, str(folder / "config.json"))
    quantized = folder / huggingface.QUANTIZATION
    if regular.is_file(quantized):
        found = forms.read_json(quantized, _Quantized, "file", "copy or download the model again")
        described = {"quant_method": "modelopt", **found["quantization"]}
        families.refuse_quantized({"quantization_config": described}, str(quantized))
    return config


def model_folder(folder: Path, *, exported: bool = False) -> dict[str, Any]:
    """The ``config.json`` of ``--pretrained-model-path``, whose weights are checked.

    Of one that is ``exported``, without what it says about quantization.
    UsageError if they are no safetensors, incomplete, or quantized already.
    """
    if exported:
        config = model_config(folder, "--pretrained-model-path")
        config = {key: value for key, value in config.items() if key != "quantization_config"}
    else:
        config = unquantized(folder)
    huggingface.end_tokens(folder)  # before the weights are read
    if not any((folder / n).is_file() for n in (safetensors_index.INDEX, safetensors_index.SINGLE)):
        cause = f"it has neither {safetensors_index.SINGLE} nor {safetensors_index.INDEX}"
        remedy = "download the weights too, or name a folder that has them"
        pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickled:
            cause = f"its weights are pickled ({pickled[0]}): loading them could run any code"
            remedy = "save the model as safetensors: transformers' save_pretrained does"
        raise UsageError(f"--pretrained-model-path {folder}", cause, remedy)
    index = safetensors_index.read(folder)
    name = next((each for each in _EMBEDDINGS if each in index), "")
    if name and config.get("vocab_size") not in (None, index[name].shape[0]):
        raise UsageError(
            f"{folder / 'config.json'}: vocab_size = {config['vocab_size']}",
            f"{name} has {index[name].shape[0]} rows",
            "state the number of rows as vocab_size; further rows belong to no token",
        )
    return config
