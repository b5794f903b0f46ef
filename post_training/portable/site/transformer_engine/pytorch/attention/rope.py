"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864)."""

from __future__ import annotations

import torch

__all__ = ["apply_rotary_pos_emb"]


def _rotate(tensor: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Each pair (a, b) to (-b, a); pairs are neighbours, or one from each half."""
    if interleaved:
        first, second = tensor[..., 0::2], tensor[..., 1::2]
        return torch.stack((-second, first), dim=-1).flatten(-2)
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _apply(tensor: torch.Tensor, angles: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``tensor`` [s, ..., h, d], ``angles`` [s, 1, 1, r] with r <= d; the rest passes."""
    rotated, rest = tensor[..., : angles.shape[-1]], tensor[..., angles.shape[-1] :]
    angles = angles.float()
    if tensor.dim() == 3:
        angles = angles.squeeze(1)
    cosine, sine = angles.cos(), angles.sin()
    result = rotated.float() * cosine + _rotate(rotated.float(), interleaved) * sine
    return torch.cat((result.to(tensor.dtype), rest), dim=-1)


def apply_rotary_pos_emb(
    t: torch.Tensor,
    freqs: torch.Tensor,
    tensor_format: str = "sbhd",
    interleaved: bool = False,
    fused: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    cp_size: int = 1,
    cp_rank: int = 0,
    start_positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate ``t`` by the angles ``freqs`` [s, 1, 1, r] (radians), computed in float32.

    ``tensor_format`` is "sbhd", "bshd" or "thd" (packed, with ``cu_seqlens`` [sequences + 1]).

    Raises:
        NotImplementedError: for context parallelism and start positions.
    """
    if cp_size > 1 or start_positions is not None:
        raise NotImplementedError(
            "rotary embedding of the stand-in: no context parallelism, no start positions; "
            "set apply_rope_fusion=False"
        )
    if tensor_format == "thd":
        if cu_seqlens is None:
            raise ValueError("format thd needs cu_seqlens")
        lengths = cu_seqlens.diff().tolist()
        parts = t.split(lengths)
        return torch.cat([_apply(part, freqs[: part.shape[0]], interleaved) for part in parts])
    if tensor_format == "bshd":
        return _apply(t.transpose(0, 1), freqs[: t.shape[1]], interleaved).transpose(0, 1)
    return _apply(t, freqs[: t.shape[0]], interleaved)
