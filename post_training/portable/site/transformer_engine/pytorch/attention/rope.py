"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), for ``apply_rope_fusion``.

extensions/transformer_engine.py:3378 imports the function; without ``apply_rope_fusion``
megatron-core rotates by itself.
"""

from __future__ import annotations

from typing import Any

import torch


def _rotate(tensor: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each pair (a, b) to (-b, a); pairs are neighbours, or one from each half."""
    if interleaved:
        first, second = tensor[..., 0::2], tensor[..., 1::2]
        return torch.stack((-second, first), dim=-1).flatten(-2)
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    interleaved: bool = False,
    **ignored: Any,
) -> torch.Tensor:
    """Rotate the first r channels of ``t`` [s, b, h, d], computed in float32.

    Args:
        t: queries or keys.
        freqs: angles in radians, [s, 1, 1, r] or longer, r <= d.
        tensor_format: only "sbhd".
        interleaved: whether a pair are neighbours instead of one channel from each half.

    Raises:
        NotImplementedError: for packed sequences.
    """
    if tensor_format != "sbhd":
        raise NotImplementedError(
            f"rotary embedding of the stand-in: no tensor_format {tensor_format!r}; "
            "set apply_rope_fusion=False"
        )
    angles = freqs[: t.shape[0]].float()
    rotated, rest = t[..., : angles.shape[-1]], t[..., angles.shape[-1] :]
    result = rotated.float() * angles.cos() + _rotate(rotated.float(), interleaved) * angles.sin()
    return torch.cat((result.to(t.dtype), rest), dim=-1)
