"""The two normalizations, as a function and as layers.

megatron-core takes the layers from its TENorm (extensions/transformer_engine.py:829-844) and from
ModelOpt's layer spec (post_training/modelopt/layers.py:68-85); ModelOpt makes them prunable
(nas/plugins/megatron.py:285).

Both compute in float32 and cast to the input's type *before* they multiply by the weight, in the
order of Hugging Face's Llama and Qwen models. Transformer Engine's kernels multiply in float32 and
round once, at the end: that differs by up to one unit in the last place of bfloat16. The order
here makes Megatron models and their ``transformers`` originals agree bit for bit. So do those of
the weights that are stored less one: Nemotron's LayerNorm rounds the sum, and Gemma's RMSNorm
rounds once, at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812

from transformer_engine.pytorch.module.base import Device, TransformerEngineBaseModule

__all__ = ["LayerNorm", "RMSNorm", "norm_parameter", "normalize"]


def normalize(
    inp: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    normalization: str,
    eps: float,
    zero_centered: bool,
) -> torch.Tensor:
    """Normalize over the last dimension.

    Args:
        inp: [..., size].
        weight: [size]; the factor minus one if ``zero_centered`` (LayerNorm1p).
        bias: [size], None for "RMSNorm".
        normalization: "RMSNorm" (arXiv:1910.07467) or "LayerNorm" (arXiv:1607.06450).
    """
    size = inp.shape[-1:]
    if normalization == "LayerNorm":
        return F.layer_norm(inp, size, weight + 1 if zero_centered else weight, bias, eps)
    if zero_centered:
        scale = weight.float() + 1
        return (F.rms_norm(inp.float(), size, None, eps) * scale).to(inp.dtype)
    # One operator, which computes in float32 and rounds to the input's type.
    return weight * F.rms_norm(inp, size, None, eps)


def norm_parameter(
    size: int,
    value: float,
    sequence_parallel: bool,
    dtype: torch.dtype | None,
    device: Device | None,
) -> torch.nn.Parameter:
    """A parameter [size] that starts at ``value``. With sequence parallelism megatron-core sums its
    gradient over the ranks (distributed/finalize_model_grads.py)."""
    parameter = torch.nn.Parameter(torch.full((size,), value, dtype=dtype, device=device))
    vars(parameter)["sequence_parallel"] = sequence_parallel
    return parameter


class _Norm(TransformerEngineBaseModule):
    """Normalization over the last dimension with a weight ``[size]``."""

    normalization: str
    bias: torch.nn.Parameter

    def __init__(
        self,
        normalized_shape: int | None = None,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Device | None = None,
        hidden_size: int | None = None,
    ) -> None:
        """The size is ``normalized_shape`` (extensions/transformer_engine.py:844) or its older
        name ``hidden_size`` (post_training/modelopt/layers.py:69)."""
        super().__init__()
        size = normalized_shape or hidden_size
        if size is None:
            raise ValueError(f"{type(self).__name__} needs normalized_shape")
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.sequence_parallel = sequence_parallel
        start = 0.0 if zero_centered_gamma else 1.0
        self.weight = norm_parameter(size, start, sequence_parallel, params_dtype, device)
        if self.normalization == "LayerNorm":
            self.bias = norm_parameter(size, 0.0, sequence_parallel, params_dtype, device)

    def forward(self, inp: torch.Tensor) -> torch.Tensor:
        """[..., size] to the same shape and type."""
        bias = self.bias if self.normalization == "LayerNorm" else None
        return normalize(
            inp, self.weight, bias, self.normalization, self.eps, self.zero_centered_gamma
        )


class LayerNorm(_Norm):
    """Layer normalization, with a bias ``[size]``."""

    normalization = "LayerNorm"


class RMSNorm(_Norm):
    """Root-mean-square normalization."""

    normalization = "RMSNorm"
