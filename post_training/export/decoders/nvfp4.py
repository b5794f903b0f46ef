"""NVFP4: two E2M1 codes a byte (low nibble first), an E4M3 scale per 16 inputs, a float32 scale."""

from __future__ import annotations

from typing import Any

import torch

from post_training.export.decoders.base import Decoder, Read, require_dtype, require_shape

BLOCK = 16
# Values by code; bit 3 is the sign (OCP Microscaling specification 1.0).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def decode(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_dtype(module, stored, torch.uint8)
    rows, columns = stored.shape[0], 2 * stored.shape[1]
    scale = read(f"{module}.weight_scale")
    require_dtype(f"{module} scale", scale, torch.float8_e4m3fn)
    require_shape(module, scale, (rows, columns // BLOCK))
    table = torch.tensor(E2M1, device=stored.device)
    codes = torch.stack((stored & 0xF, stored >> 4), dim=-1).reshape(rows, columns)
    values = table[codes.long()].reshape(rows, -1, BLOCK)
    block_scale = scale.float() * read(f"{module}.weight_scale_2").float()
    return (values * block_scale.unsqueeze(-1)).reshape(rows, columns)


_SCALES = ("weight_scale", "weight_scale_2")
_FORM: dict[str, Any] = {"per_element": 2, "block": BLOCK, "zero_scales": True}
NVFP4 = (
    Decoder("NVFP4", "U8", decode, scales=(*_SCALES, "input_scale"), **_FORM),
    Decoder("W4A16_NVFP4", "U8", decode, scales=_SCALES, **_FORM),
)
