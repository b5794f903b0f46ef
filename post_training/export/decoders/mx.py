"""MXFP8: E4M3 codes, a power of two (E8M0, bias 127) per 32 inputs."""

from __future__ import annotations

import torch

from post_training.export.decoders.base import Decoder, Read, require_dtype, require_shape

BLOCK = 32
_NOT_A_NUMBER = 255  # of E8M0


def decode(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_dtype(module, stored, torch.float8_e4m3fn)
    return times_powers(read, module, stored.float())


def times_powers(read: Read, module: str, values: torch.Tensor) -> torch.Tensor:
    """Values in float32 [out, in], each block of them times its power of two."""
    scale = read(f"{module}.weight_scale")
    require_dtype(f"{module} scale", scale, torch.uint8)
    require_shape(module, scale, (values.shape[0], values.shape[1] // BLOCK))
    if (scale == _NOT_A_NUMBER).any():
        raise ValueError(f"{module} has a scale that is not a number")
    power = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    blocks = values.reshape(values.shape[0], -1, BLOCK)
    return (blocks * power.unsqueeze(-1)).reshape(values.shape)


MX = (Decoder("MXFP8", "F8_E4M3", decode, scales=("weight_scale",), block=BLOCK, zero_scales=True),)
