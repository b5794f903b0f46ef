"""ModelOpt's layout of INT8, a byte each, and of INT4, two rows a byte, also where FP8 follows."""

from __future__ import annotations

from typing import Any

import torch

from post_training.export.decoders.base import Decoder, Read, require_dtype, require_shape

_GROUP = 128


def _bytes(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_dtype(module, stored, torch.int8)
    scale = read(f"{module}.weight_scale").float()
    require_shape(module, scale, (stored.shape[0],))
    return stored.float() * scale.unsqueeze(1)


def _halves(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    codes, scale = _codes_and_scales(read, module, stored)
    return _times(codes, scale)


def _halves_for_fp8(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    """As the engine computes them: in half precision, then rounded to E4M3."""
    codes, scale = _codes_and_scales(read, module, stored)
    whole = read(f"{module}.weight_scale_2")
    for name in ("weight_scale_2", "input_scale"):
        require_shape(module, read(f"{module}.{name}"), ())
        require_dtype(f"{module}.{name}", read(f"{module}.{name}"), torch.float32)
    products = _times(codes.half(), (scale.half() / whole).half()).float()
    return products.to(torch.float8_e4m3fn).float() * whole


def _times(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Each code times the scale of its group."""
    return (codes.unflatten(1, (-1, _GROUP)) * scale.unsqueeze(-1)).flatten(1)


def _codes_and_scales(
    read: Read, module: str, stored: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    require_dtype(module, stored, torch.uint8)
    rows, columns = 2 * stored.shape[0], stored.shape[1]
    factors = read(f"{module}.pre_quant_scale")
    require_shape(module, factors, (columns,))
    if not (factors == 1).all():
        raise ValueError(f"{module} multiplies its inputs (pre_quant_scale)")
    scale = read(f"{module}.weight_scale").float()
    require_shape(module, scale, (rows, columns // _GROUP))
    # A code of 8 and more is the two's complement of a negative one.
    codes = torch.stack((stored & 0xF, stored >> 4), dim=1).reshape(rows, columns).float()
    codes -= 16 * (codes >= 8)
    return codes, scale


_SCALES = ("weight_scale", "pre_quant_scale")
_FORM: dict[str, Any] = {"rows_per_element": 2, "block": _GROUP}
_OF_FP8 = ("weight_scale_2", "input_scale")
MODELOPT_INTEGERS = (
    Decoder("W8A16", "I8", _bytes, scales=("weight_scale",)),
    Decoder("W4A16_AWQ", "U8", _halves, scales=_SCALES, **_FORM),
    Decoder("W4A8_AWQ", "U8", _halves_for_fp8, scales=(*_SCALES, *_OF_FP8), **_FORM),
)
