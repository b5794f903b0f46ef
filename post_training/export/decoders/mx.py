"""MXFP8: E4M3 codes, a power of two (E8M0, bias 127) per 32 inputs."""

from __future__ import annotations

import torch

from post_training.export.decoders.base import Decoder, Read, require_dtype, require_shape

BLOCK = 32


def decode(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_dtype(module, stored, torch.float8_e4m3fn)
    scale = read(f"{module}.weight_scale")
    require_dtype(f"{module} scale", scale, torch.uint8)
    require_shape(module, scale, (stored.shape[0], stored.shape[1] // BLOCK))
    power = torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - 127)
    blocks = stored.float().reshape(stored.shape[0], -1, BLOCK)
    return (blocks * power.unsqueeze(-1)).reshape(stored.shape)


MX = (Decoder("MXFP8", "F8_E4M3", decode, zero_scales=True),)
