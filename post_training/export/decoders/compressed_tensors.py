"""compressed-tensors: INT8 a byte each, or 8 or 4 bits each in words of 32, lowest bits first; and
MXFP4, two a byte."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from post_training.export.decoders.base import Decoder, Read, require_dtype, require_shape
from post_training.export.decoders.mx import times_powers
from post_training.export.decoders.nvfp4 import E2M1

METHOD = "compressed-tensors"
MIXED = "MIXED_COMPRESSED_TENSORS"  # our name for several in one model
_MIXTURE = "mixed-precision"
_FIXED = {"symmetric": True, "dynamic": False}
_ROWS = {**_FIXED, "type": "int", "strategy": "channel"}
_BYTES = {**_ROWS, "num_bits": 8}
_GROUPS = {**_ROWS, "num_bits": 4, "strategy": "group", "group_size": 128}
_BLOCKS = {**_FIXED, "num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
_TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
_CACHE = {**_FIXED, "num_bits": 8, "type": "float", "strategy": "tensor"}
# What is read -> the layout's name, and what is said about weights and inputs.
_ALGORITHMS: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "INT8_W8A8": ("int-quantized", _BYTES, {**_BYTES, "strategy": "tensor"}),
    "INT8_PER_CHANNEL_PER_TOKEN": ("int-quantized", _BYTES, {**_TOKENS, "type": "int"}),
    "INT8_W8A16": ("pack-quantized", _BYTES, None),
    "INT4_W4A16": ("pack-quantized", _GROUPS, None),
    "INT4_W4A8": ("pack-quantized", _GROUPS, _TOKENS),
    "MXFP4": ("mxfp4-pack-quantized", _BLOCKS, {**_BLOCKS, "dynamic": True}),
    "W4A16_MXFP4": ("mxfp4-pack-quantized", _BLOCKS, None),
}


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``quantization_config`` says, with the keys of ``hf_quant_config.json``.

    Raises:
        ValueError: for a configuration that is none of those that are exported.
    """
    groups = [*(config.get("config_groups") or {}).values()]
    found = [_algorithm(group) for group in groups]
    said: dict[str, Any]
    if len(groups) == 1:
        said = {"quant_algo": found[0]}
        forms, names = {_ALGORITHMS[found[0]][0]}, groups[0].get("targets")
        is_right = names == ["Linear"]
    else:
        pairs = [(n, how) for g, how in zip(groups, found, strict=True) for n in g["targets"]]
        listed = {name: {"quant_algo": how} for name, how in pairs}
        said = {"quant_algo": MIXED, "quantized_layers": listed}
        forms = {_MIXTURE}
        # Names of linears alone: a class of them, or a pattern, would be looked for in their order.
        is_right = len(listed) == len(pairs) > 0 and all("." in n and ":" not in n for n in listed)
    if not is_right or {config.get("format")} != forms:
        raise ValueError(f"config_groups are none that is exported: the format of {found}")
    cache = config.get("kv_cache_scheme")
    if cache is not None and not _is(_CACHE, cache):
        raise ValueError("kv_cache_scheme is none that is exported")
    return {
        **said,
        "exclude_modules": config.get("ignore") or [],
        "kv_cache_quant_algo": None if cache is None else "FP8",
    }


def _algorithm(group: Mapping[str, Any]) -> str:
    """What a group of linears is exported as."""
    weights, inputs = dict(group.get("weights") or {}), group.get("input_activations")
    if weights.get("group_size") in (-1, None):  # both say that the scale is the whole row's
        weights.pop("group_size", None)
    found = next((n for n, form in _ALGORITHMS.items() if _says(form, weights, inputs)), None)
    if found is None or group.get("format") != _ALGORITHMS[found][0]:
        raise ValueError(f"config_groups are none that is exported: {found or group}")
    return found


def _says(form: Any, weights: Mapping[str, Any], inputs: Mapping[str, Any] | None) -> bool:
    _, of_weights, of_inputs = form
    if of_inputs is None or inputs is None:
        return of_inputs is inputs and _is(of_weights, weights)
    return _is(of_weights, weights) and _is(of_inputs, inputs)


def _is(wanted: Mapping[str, Any], said: Mapping[str, Any]) -> bool:
    """Whether all is said that is wanted, and no group's size beside it."""
    same = all(said.get(key) == value for key, value in wanted.items())
    return same and said.get("group_size") == wanted.get("group_size")


def cache_scale(name: str) -> str:
    """Where the scale ``*.k_proj.k_scale`` of ModelOpt's layout stands."""
    attention, _, kind = name.rsplit(".", 2)
    return f"{attention}.{kind}"


def _bytes(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_shape(module, read(f"{module}.input_scale"), (1,))
    return _bytes_alone(read, module, stored)


def _bytes_alone(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_dtype(module, stored, torch.int8)
    scale = read(f"{module}.weight_scale")
    require_dtype(f"{module} scale", scale, torch.float32)
    require_shape(module, scale, (stored.shape[0], 1))
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


def _words_for_fp8(read: Read, module: str, stored: torch.Tensor) -> Any:
    """vLLM rounds the scales to E4M3 times one of the row, which must not change them."""
    scale = read(f"{module}.weight_scale").float()
    # The smallest that its kernel for dynamic scales gives; it stores an eighth of the codes.
    row = (scale.amax(1, keepdim=True) / 448).clamp_min(1 / (448 * 512))
    codes = (scale / row).to(torch.float8_e4m3fn).float() / 8
    kept = codes.to(torch.float8_e4m3fn).float() * 8 * row
    if not torch.allclose(kept, scale, rtol=2**-8, atol=0):
        raise ValueError(f"{module} has scales that are no E4M3 numbers times one of the row")
    return _words(4, 128, read, module, stored)


def _halves(read: Read, module: str, stored: torch.Tensor) -> Any:
    require_dtype(module, stored, torch.uint8)
    table = torch.tensor(E2M1, device=stored.device)
    codes = torch.stack((stored & 0xF, stored >> 4), dim=-1).flatten(1)
    return times_powers(read, module, table[codes.long()])


_SCALES = ("weight_scale", "weight_shape")
_MX: dict[str, Any] = {
    **{"scales": ("weight_scale",), "stored": "weight_packed"},
    "zero_scales": True,
}
_PACKED: dict[str, Any] = {"scales": _SCALES, "stored": "weight_packed"}
COMPRESSED_TENSORS = (
    Decoder("INT8_W8A8", "I8", _bytes),
    Decoder("INT8_PER_CHANNEL_PER_TOKEN", "I8", _bytes_alone, scales=("weight_scale",)),
    Decoder("INT8_W8A16", "I32", partial(_words, 8, None), 4, **_PACKED),
    Decoder("INT4_W4A16", "I32", partial(_words, 4, 128), 8, **_PACKED),
    Decoder("INT4_W4A8", "I32", _words_for_fp8, 8, **_PACKED),
    Decoder("MXFP4", "U8", _halves, 2, **_MX),
    Decoder("W4A16_MXFP4", "U8", _halves, 2, **_MX),
)
