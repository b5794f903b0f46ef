"""Normalization followed by a linear layer.

megatron-core derives TELayerNormColumnParallelLinear from it (extensions/transformer_engine.py
:1122). While a quantized layer runs, ModelOpt's plugin (quantization/plugins/transformer_engine.py
:307-425) replaces ``_LayerNormLinear`` and ``general_gemm`` of *this module*: both are looked up
here at each call. In the backward pass it takes the first product for the input's gradient and the
second for the weight's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from transformer_engine.pytorch.module.base import call
from transformer_engine.pytorch.module.linear import Linear, Parallelism
from transformer_engine.pytorch.module.norms import norm_parameter, normalize


def general_gemm(
    A: torch.Tensor,  # noqa: N803 -- names of the real package
    B: torch.Tensor,  # noqa: N803
    layout: str = "TN",
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor]:
    """A product in column-major terms, as cuBLAS sees it: ``op(B) @ op(A)``, in a tuple.

    ModelOpt replaces it to quantize ``B`` (forward) or ``A`` (gradient of the weight): hence the
    form. It is not offered as ``cpp_extensions.general_gemm``, without which megatron-core's router
    multiplies in the router's precision itself (transformer/moe/moe_utils.py:1326).

    Args:
        A, B: see ``layout``.
        layout: "TN" is ``B @ A.T`` (forward: A = weight [out, in], B = input [..., in]), "NN" is
            ``B @ A`` (gradient of the input) and "NT" is ``B.T @ A`` (gradient of the weight,
            leading dimensions flattened).
        bias: [out], added with "TN".
    """
    if layout == "TN":
        return (F.linear(B, A, bias),)
    if layout == "NN":
        return (B.matmul(A),)
    return (B.flatten(0, -2).t().matmul(A.flatten(0, -2)),)


class _LayerNormLinear(torch.autograd.Function):
    """``normalize(inp) @ weight.T + bias``; the backward pass recomputes the normalization."""

    @staticmethod
    def forward(
        ctx: Any,
        inp: torch.Tensor,
        ln_weight: torch.Tensor,
        ln_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        norm: tuple[str, float, bool],
        parallelism: Parallelism,
        return_layernorm_output: bool,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """[..., in] to [..., out], or (that, normalized [..., in]) on request.

        ``norm`` is (name, epsilon, whether the weight is stored minus one). ``ctx`` is None where
        no gradient is wanted.
        """
        normalized = normalize(inp, ln_weight, ln_bias, *norm)
        out = general_gemm(weight, parallelism.gathered_input(normalized), bias=bias)[0]
        if ctx is not None:
            ctx.save_for_backward(inp, ln_weight, ln_bias, weight)
            ctx.norm = norm
            ctx.parallelism = parallelism
        return (out, normalized) if return_layernorm_output else out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *normed, weight = ctx.saved_tensors
        needs_weight, needs_bias = ctx.needs_input_grad[3:5]
        grad = grads[0]
        leaves = [
            None if each is None else each.detach().requires_grad_(needed)
            for each, needed in zip(normed, ctx.needs_input_grad[:3], strict=True)
        ]
        with torch.enable_grad():
            normalized = normalize(*leaves, *ctx.norm)
        product = general_gemm(weight, grad, layout="NN")[0]
        product = ctx.parallelism.reduced_gradient(product)
        if len(grads) > 1:
            product = product + grads[1]
        weight_gradient = None
        if needs_weight:
            gathered = ctx.parallelism.gathered_input(normalized.detach())
            weight_gradient = general_gemm(gathered, grad, layout="NT")[0]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        if wanted:
            torch.autograd.backward(normalized, product, inputs=wanted)
        of_norm = [None if leaf is None else leaf.grad for leaf in leaves]
        bias_gradient = grad.flatten(0, -2).sum(0) if needs_bias else None
        return *of_norm, weight_gradient, bias_gradient, None, None, None


class LayerNormLinear(Linear):
    """A normalization with ``layer_norm_weight`` [in] (and ``layer_norm_bias``), then a linear."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        eps: float = 1e-5,
        normalization: str = "LayerNorm",
        zero_centered_gamma: bool = False,
        **options: Any,
    ) -> None:
        """As :class:`Linear`, with the normalization's name, "LayerNorm" or "RMSNorm".

        Raises:
            ValueError: for another normalization.
        """
        if normalization not in ("LayerNorm", "RMSNorm"):
            raise ValueError(f"normalization {normalization!r}: LayerNorm or RMSNorm")
        super().__init__(in_features, out_features, **options)
        self.eps = eps
        self.normalization = normalization
        self.zero_centered_gamma = zero_centered_gamma
        # ModelOpt sets it to score a model for pruning (prune/plugins/mcore_minitron.py:1206).
        self.return_layernorm_output = False
        kind = (self.sequence_parallel, self.weight.dtype, self.weight.device)
        self.layer_norm_weight = norm_parameter(
            in_features, 0.0 if zero_centered_gamma else 1.0, *kind
        )
        self.layer_norm_bias: torch.nn.Parameter | None = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = norm_parameter(in_features, 0.0, *kind)

    def forward(
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, **ignored: Any
    ) -> Any:
        """[..., in] to [..., out], followed by the bias, not added, with ``return_bias`` and by
        the normalized input [..., in] with ``return_layernorm_output``.

        With sequence parallelism the first dimension of ``inp`` is split over the ranks.
        """
        out = call(
            _LayerNormLinear,
            inp,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.weight,
            self.bias if self.apply_bias else None,
            (self.normalization, self.eps, self.zero_centered_gamma),
            Parallelism(self.parallel_mode, self.sequence_parallel, self.tp_group),
            self.return_layernorm_output,
        )
        if self.return_layernorm_output:
            out, normalized = out
            return (out, self.bias, normalized) if self.return_bias else (out, normalized)
        return (out, self.bias) if self.return_bias else out
