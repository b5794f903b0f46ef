"""FP8: E4M3 codes times one float32 scale, or one per output row."""

from __future__ import annotations

import torch

from post_training.export.decoders.base import Decoder, Read, require_dtype, require_shape


def decode(read: Read, module: str, stored: torch.Tensor) -> torch.Tensor:
    require_dtype(module, stored, torch.float8_e4m3fn)
    scale = read(f"{module}.weight_scale").float()
    if scale.numel() > 1:
        require_shape(module, scale.flatten(), (stored.shape[0],))
    return stored.float() * scale.reshape(-1, 1)


FP8 = (
    Decoder("FP8", "F8_E4M3", decode),
    Decoder("FP8_PER_CHANNEL_PER_TOKEN", "F8_E4M3", decode),
)
