"""Splitting a projection into its parts."""

from __future__ import annotations

from typing import Any

import torch


class _SplitAlongDim(torch.autograd.Function):
    """``torch.split`` whose outputs are no views of each other for autograd.

    ``apply(tensor, dimension, size or sizes, squeeze=False)``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tensor: torch.Tensor,
        dimension: int,
        sizes: int | list[int],
        squeeze: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        ctx.dimension = dimension
        ctx.squeeze = squeeze
        parts = torch.split(tensor, sizes, dim=dimension)
        if squeeze:
            return tuple(part.squeeze(dimension) for part in parts)
        return tuple(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        if ctx.squeeze:
            gradients = tuple(each.unsqueeze(ctx.dimension) for each in gradients)
        return torch.cat(gradients, dim=ctx.dimension), None, None, None
