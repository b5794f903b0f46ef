"""Tensors that belong to no layer of the Megatron model, and travel beside it from file to file.

DeepSeek-V3's layers for predicting further tokens and Llama 4's vision tower are such. A checkpoint
has them in files beside its ``config.json``; an export has them under their names, not quantized.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from post_training.checkpoints import dequantize, huggingface
from post_training.common import safetensors_index
from post_training.common.safetensors_index import Entry
from post_training.models.families import registry as families

logger = logging.getLogger(__name__)

_PATTERN = "extra_tensors-*.safetensors"
_SHARD_BYTES = 4 * 10**9


def find(folder: Path) -> dict[str, Entry]:
    """The tensors by name: of a Hugging Face folder, or of the files beside a ``config.json``.

    Scales of quantized ones are left out.
    """
    found: dict[str, Entry] = {}
    carried = sorted(folder.glob(_PATTERN))
    for path in carried:
        found.update(safetensors_index.read_file(path))
    names = (safetensors_index.INDEX, safetensors_index.SINGLE)
    if carried or not any((folder / name).is_file() for name in names):
        return found
    config = huggingface.read_config(folder)
    reader = dequantize.reader(config)
    for name, entry in safetensors_index.read(folder).items():
        is_scale = reader is not None and name.endswith(reader.scales)
        if families.is_carried(config, name) and not is_scale:
            found[name] = entry
    return found


def read(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor as it is stored; FP8 as the bf16 numbers that it stands for."""
    found = find(folder)
    if not found:
        return
    index = {} if any(folder.glob(_PATTERN)) else safetensors_index.read(folder)
    reader = dequantize.reader(huggingface.read_config(folder)) if index else None
    for name, entry in found.items():
        tensor = _stored(name, entry)
        if dequantize.is_packed(entry) and isinstance(reader, dequantize.BlockFp8):
            scales = name + reader.scales
            whole = reader.decode(tensor, _stored(scales, index[scales]), (0, 0))
            tensor = whole.to(torch.bfloat16)
        yield name, tensor


def carry(source: Path, target: Path) -> None:
    """Write the tensors of ``source`` beside the ``config.json`` of ``target``.

    None where that has no place for them any more: a pruned model predicts no further tokens.
    """
    config = huggingface.read_config(target)
    if not all(families.is_carried(config, name) for name in find(source)):
        logger.info("tensors of no layer here are left out: they fit the model of before alone")
        return
    for path in source.glob(_PATTERN):
        shutil.copyfile(path, target / path.name)
    if any(source.glob(_PATTERN)):
        return
    pending: dict[str, torch.Tensor] = {}
    size = count = 0
    for name, tensor in read(source):
        if pending and size + tensor.nbytes > _SHARD_BYTES:
            _write(pending, target, count := count + 1)
            pending, size = {}, 0
        pending[name] = tensor
        size += tensor.nbytes
    if pending:
        _write(pending, target, count + 1)


def _write(tensors: dict[str, torch.Tensor], target: Path, number: int) -> None:
    save_file(tensors, target / _PATTERN.replace("*", f"{number:05d}"), metadata={"format": "pt"})
    logger.info("%d tensors of no layer here travel with the checkpoint", len(tensors))


def _stored(name: str, entry: Entry) -> torch.Tensor:
    with safe_open(entry.path, framework="pt") as file:
        found: torch.Tensor = file.get_tensor(name)
    return found
