"""ModelOpt's layout of INT8, a byte each, and of INT4, two rows a byte."""

from __future__ import annotations

import torch

from post_training.export.decoders.base import Decoder, Read, require_dtype, require_shape

_GROUP = 128


def _bytes(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_dtype(module, stored, torch.int8)
    scale = read(f"{module}.weight_scale").float()
    require_shape(module, scale, (stored.shape[0],))
    return stored.float() * scale.unsqueeze(1)


def _halves(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
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
    return (codes.unflatten(1, (-1, _GROUP)) * scale.unsqueeze(-1)).flatten(1)


MODELOPT_INTEGERS = (
    Decoder("W8A16", "I8", _bytes, scales=("weight_scale",)),
    Decoder(
        "W4A16_AWQ",
        "U8",
        _halves,
        rows_per_element=2,
        scales=("weight_scale", "pre_quant_scale"),
        block=_GROUP,
    ),
)
