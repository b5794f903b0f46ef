"""The norm after a Mamba-2 scan: of groups of channels, with a gate before or after it."""

from __future__ import annotations

import torch
from torch.nn import functional


class RMSNorm(torch.nn.Module):
    """RMS norm of each group of channels.

    Args:
        hidden_size: channels.
        group_size: channels that are normalized together; None: all.
        norm_before_gate: the gate multiplies the norm's output; False: its input.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps, self.norm_before_gate = eps, norm_before_gate
        self.group_size = group_size or hidden_size
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        """``x`` and the gate's input ``z`` are [..., hidden_size]; computed in float32."""
        gate = None if z is None else functional.silu(z.float())
        values = x.float()
        if gate is not None and not self.norm_before_gate:
            values = values * gate
        groups = values.unflatten(-1, (-1, self.group_size))
        squares = groups.square().mean(-1, keepdim=True)
        values = (groups * torch.rsqrt(squares + self.eps)).flatten(-2) * self.weight.float()
        if gate is not None and self.norm_before_gate:
            values = values * gate
        return values.to(x.dtype)
