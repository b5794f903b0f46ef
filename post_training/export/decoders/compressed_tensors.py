"""compressed-tensors: INT8 a byte each, or 8 or 4 bits each in words of 32, lowest bits first."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from post_training.export.decoders.base import Decoder, Read, require_dtype, require_shape

METHOD = "compressed-tensors"
# Weight bits, group size and whether inputs are quantized -> what is read, and the layout's name.
_ALGORITHMS = {
    (8, None, True): ("INT8_W8A8", "int-quantized"),
    (8, None, False): ("INT8_W8A16", "pack-quantized"),
    (4, 128, False): ("INT4_W4A16", "pack-quantized"),
}


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``quantization_config`` says, with the keys of ``hf_quant_config.json``.

    Raises:
        ValueError: for a configuration that is none of those that are exported.
    """
    groups = config.get("config_groups") or {}
    if len(groups) != 1:
        raise ValueError(f"{len(groups)} config_groups instead of one")
    (group,) = groups.values()
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    # -1 and null both say that the scale is the whole row's.
    size = None if weights.get("group_size") == -1 else weights.get("group_size")
    found: Any = (weights.get("num_bits"), size, inputs is not None)
    algorithm, layout = _ALGORITHMS.get(found, ("", ""))
    strategy = "group" if size else "channel"
    wanted = {"type": "int", "symmetric": True, "dynamic": False, "strategy": strategy}
    wrong = [key for key, value in wanted.items() if weights.get(key) != value]
    if inputs is not None:
        wanted |= {"num_bits": 8, "strategy": "tensor"}
        wrong += [f"input {key}" for key, value in wanted.items() if inputs.get(key) != value]
    if group.get("targets") != ["Linear"]:
        wrong.append("targets")
    if config.get("format") != layout or wrong:
        raise ValueError(
            f"config_groups are none that is exported ({', '.join(wrong) or 'format'})"
        )
    return {
        "quant_algo": algorithm,
        "exclude_modules": config.get("ignore") or [],
        "kv_cache_quant_algo": None,
    }


def _bytes(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_dtype(module, stored, torch.int8)
    scale = read(f"{module}.weight_scale")
    require_dtype(f"{module} scale", scale, torch.float32)
    require_shape(module, scale, (stored.shape[0], 1))
    require_shape(module, read(f"{module}.input_scale"), (1,))
    return stored.float() * scale


def _words(bits: int, group: int | None, read: Read, module: str, stored: torch.Tensor) -> Any:
    require_dtype(module, stored, torch.int32)
    rows, columns = stored.shape[0], stored.shape[1] * (32 // bits)
    if read(f"{module}.weight_shape").tolist() != [rows, columns]:
        raise ValueError(f"{module} has a weight_shape that is not {[rows, columns]}")
    scale = read(f"{module}.weight_scale").float()
    require_shape(module, scale, (rows, columns // (group or columns)))
    mask = 2**bits - 1
    parts = [(stored >> shift) & mask for shift in range(0, 32, bits)]
    codes = torch.stack(parts, dim=-1).reshape(rows, columns) - 2 ** (bits - 1)
    blocks = codes.float().reshape(rows, scale.shape[1], -1) * scale.unsqueeze(-1)
    return blocks.reshape(rows, columns)


_SCALES = ("weight_scale", "weight_shape")
COMPRESSED_TENSORS = (
    Decoder("INT8_W8A8", "I8", _bytes),
    Decoder(
        "INT8_W8A16", "I32", partial(_words, 8, None), 4, scales=_SCALES, stored="weight_packed"
    ),
    Decoder(
        "INT4_W4A16", "I32", partial(_words, 4, 128), 8, scales=_SCALES, stored="weight_packed"
    ),
)
