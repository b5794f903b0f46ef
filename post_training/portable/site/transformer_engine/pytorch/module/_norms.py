"""The two normalizations as functions.

Both compute in float32 and cast to the input's type *before* they multiply by the weight, in the
order of Hugging Face's Llama and Qwen models. Transformer Engine's kernels multiply in float32 and
round once, at the end: that differs by up to one unit in the last place of bfloat16. The order
here makes Megatron models and their ``transformers`` originals agree bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812


def _scaled(weight: torch.Tensor, zero_centered: bool) -> torch.Tensor:
    return weight + 1 if zero_centered else weight


def rms_norm(
    inp: torch.Tensor, weight: torch.Tensor, eps: float, zero_centered: bool = False
) -> torch.Tensor:
    """Root-mean-square normalization over the last dimension (arXiv:1910.07467)."""
    # One operator, which computes in float32 and rounds to the input's type.
    values = F.rms_norm(inp, (inp.shape[-1],), None, eps)
    return _scaled(weight, zero_centered) * values


def layer_norm(
    inp: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    zero_centered: bool = False,
) -> torch.Tensor:
    """Layer normalization over the last dimension (arXiv:1607.06450)."""
    scale = _scaled(weight, zero_centered)
    return F.layer_norm(inp, (inp.shape[-1],), scale, bias, eps)


def normalize(
    normalization: str,
    inp: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    zero_centered: bool,
) -> torch.Tensor:
    """Either of the two by its name in megatron-core: "RMSNorm" or "LayerNorm"."""
    if normalization == "RMSNorm":
        return rms_norm(inp, weight, eps, zero_centered)
    return layer_norm(inp, weight, bias, eps, zero_centered)
