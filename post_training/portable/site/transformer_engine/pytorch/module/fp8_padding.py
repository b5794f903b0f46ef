"""Padding of experts' token counts to what FP8 products need."""

from __future__ import annotations

import torch

__all__ = ["Fp8Padding", "Fp8Unpadding"]


def _padded(counts: list[int], align: int) -> list[int]:
    return [-(-count // align) * align for count in counts]


class Fp8Padding(torch.nn.Module):
    """Pad each expert's rows to a multiple of ``align_size`` (16 by default)."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.align_size = align_size or 16

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> tuple[torch.Tensor, list[int]]:
        """[sum(m_splits), h] to ([sum(padded), h], padded counts); new rows are zero."""
        padded = _padded(m_splits, self.align_size)
        parts = [
            torch.nn.functional.pad(part, (0, 0, 0, size - part.shape[0]))
            for part, size in zip(inp.split(m_splits), padded, strict=True)
        ]
        return torch.cat(parts), padded


class Fp8Unpadding(torch.nn.Module):
    """The inverse of :class:`Fp8Padding`."""

    def __init__(self, num_gemms: int, align_size: int | None = None) -> None:
        super().__init__()
        self.num_gemms = num_gemms
        self.align_size = align_size or 16

    def forward(self, inp: torch.Tensor, m_splits: list[int]) -> torch.Tensor:
        """[sum(padded), h] to [sum(m_splits), h]."""
        parts = inp.split(_padded(m_splits, self.align_size))
        return torch.cat([p[:count] for p, count in zip(parts, m_splits, strict=True)])
