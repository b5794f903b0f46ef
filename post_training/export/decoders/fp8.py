"""FP8: E4M3 codes times float32 scales: one, one a row, or one a block of 128 x 128."""

from __future__ import annotations

import torch

from post_training.export.decoders.base import Decoder, Read, require_dtype, require_shape

BLOCK = 128


def decode(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_dtype(module, stored, torch.float8_e4m3fn)
    scale = read(f"{module}.weight_scale")
    require_shape(module, scale.flatten(), (1,))
    return stored.float() * scale.float().reshape(())


def decode_rows(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    return stored.float() * _scales(read, module, stored, (stored.shape[0],)).unsqueeze(1)


def decode_blocks(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    rows, columns = stored.shape
    if rows % BLOCK or columns % BLOCK:
        raise ValueError(f"{module} of {rows} x {columns} has no whole blocks of {BLOCK}")
    shape = (rows // BLOCK, 1, columns // BLOCK, 1)
    scale = _scales(read, module, stored, shape)
    blocks = stored.float().reshape(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    return (blocks * scale).reshape(rows, columns)


def _scales(read: Read, module: str, stored: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Engines copy the scales into tensors of this shape and dtype."""
    require_dtype(module, stored, torch.float8_e4m3fn)
    scale = read(f"{module}.weight_scale")
    require_dtype(f"{module} scale", scale, torch.float32)
    require_shape(module, scale, shape)
    return scale


FP8 = (
    Decoder("FP8", "F8_E4M3", decode),
    Decoder("FP8_PER_CHANNEL_PER_TOKEN", "F8_E4M3", decode_rows, scales=("weight_scale",)),
    Decoder("FP8_PB_WO", "F8_E4M3", decode_blocks, scales=("weight_scale",)),
)
