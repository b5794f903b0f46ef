"""Root-mean-square normalization."""

from __future__ import annotations

from typing import Any

import torch

from transformer_engine.pytorch.module._norms import rms_norm
from transformer_engine.pytorch.module.base import TransformerEngineBaseModule

__all__ = ["RMSNorm"]


class RMSNorm(TransformerEngineBaseModule):
    """Normalization over the last dimension with a weight ``[size]``."""

    def __init__(
        self,
        normalized_shape: int | tuple[int, ...] | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool | None = None,
        zero_centered_gamma: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        hidden_size: int | None = None,
        params_dtype: torch.dtype | None = None,
        **ignored: Any,
    ) -> None:
        """``hidden_size`` and ``params_dtype`` are older names of the first and fifth argument."""
        super().__init__()
        size = normalized_shape if normalized_shape is not None else hidden_size
        if size is None:
            raise ValueError("RMSNorm needs normalized_shape")
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.sequence_parallel = bool(sequence_parallel)
        self.weight = torch.nn.Parameter(
            torch.empty(size, dtype=dtype or params_dtype, device=device)
        )
        vars(self.weight)["sequence_parallel"] = self.sequence_parallel
        self.reset_parameters()

    def reset_parameters(self, defer_init: bool | None = None) -> None:
        torch.nn.init.constant_(self.weight, 0.0 if self.zero_centered_gamma else 1.0)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """[..., size] to the same shape and type."""
        return rms_norm(inp, self.weight, self.eps, self.zero_centered_gamma)
