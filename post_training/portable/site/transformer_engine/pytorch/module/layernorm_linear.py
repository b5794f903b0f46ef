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

from transformer_engine.pytorch.module.base import call
from transformer_engine.pytorch.module.linear import (
    Linear,
    Parallelism,
    general_gemm,
    weight_gradient,
)
from transformer_engine.pytorch.module.norms import norm_parameter, normalize

__all__ = ["LayerNormLinear"]


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
        fuse_wgrad_accumulation: bool,
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
            ctx.fuse = fuse_wgrad_accumulation
            ctx.parameter = weight
        return (out, normalized) if return_layernorm_output else out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inp, ln_weight, ln_bias, weight = ctx.saved_tensors
        parallelism: Parallelism = ctx.parallelism
        needs_inp, needs_ln_weight, needs_ln_bias, needs_weight, needs_bias = ctx.needs_input_grad[
            :5
        ]
        grad = grads[0]
        leaves = [
            each.detach().requires_grad_(needed)
            for each, needed in (
                (inp, needs_inp),
                (ln_weight, needs_ln_weight),
                (ln_bias, needs_ln_bias),
            )
            if each is not None
        ]
        with torch.enable_grad():
            norm_bias = leaves[2] if ln_bias is not None else None
            normalized = normalize(leaves[0], leaves[1], norm_bias, *ctx.norm)
        product = general_gemm(weight, grad, layout="NN")[0]
        product = parallelism.reduced_gradient(product)
        if len(grads) > 1:
            product = product + grads[1]
        gradient = None
        if needs_weight:
            gathered = parallelism.gathered_input(normalized.detach())
            gradient = weight_gradient(
                ctx.parameter, general_gemm(gathered, grad, layout="NT")[0], ctx.fuse
            )
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(torch.autograd.grad(normalized, wanted, product) if wanted else ())
        inp_gradient = next(found) if needs_inp else None
        ln_weight_gradient = next(found) if needs_ln_weight else None
        ln_bias_gradient = next(found) if needs_ln_bias else None
        bias_gradient = grad.flatten(0, -2).sum(0) if needs_bias else None
        return (
            inp_gradient,
            ln_weight_gradient,
            ln_bias_gradient,
            gradient,
            bias_gradient,
            None,
            None,
            None,
            None,
        )


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
            self.fuse_wgrad_accumulation,
            self.return_layernorm_output,
        )
        if self.return_layernorm_output:
            out, normalized = out
            return (out, self.bias, normalized) if self.return_bias else (out, normalized)
        return (out, self.bias) if self.return_bias else out
