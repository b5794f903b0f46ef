"""Linear layer, column- or row-parallel.

megatron-core derives TELinear from it (extensions/transformer_engine.py:855). ModelOpt's plugin
finds :class:`_Linear` here and reads its signature for ``weight`` and ``inp``
(quantization/plugins/transformer_engine.py:85-106).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from transformer_engine.pytorch.distributed import (
    all_reduce,
    gather_along_first_dim,
    reduce_scatter_along_first_dim,
)
from transformer_engine.pytorch.module.base import (
    Device,
    TransformerEngineBaseModule,
    call,
    fill,
    get_dummy_wgrad,
    mark,
)

__all__ = ["Linear"]


def general_gemm(
    A: torch.Tensor,
    B: torch.Tensor,
    layout: str = "TN",
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor]:
    """A product in column-major terms, as cuBLAS sees it: ``op(B) @ op(A)``, in a tuple.

    ModelOpt replaces it in ``layernorm_linear`` to quantize ``B`` (forward) or ``A`` (gradient of
    the weight): hence the form. It is not offered as ``cpp_extensions.general_gemm``, without which
    megatron-core's router multiplies in the router's precision itself
    (transformer/moe/moe_utils.py:1326).

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


@dataclass(frozen=True)
class Parallelism:
    """How a linear is split over ranks.

    Attributes:
        mode: "column" (output features split), "row" (input features split) or None.
        sequence: whether activations outside the layer are split along their first dimension.
        group: the ranks; None for one.
    """

    mode: str | None
    sequence: bool
    group: dist.ProcessGroup | None

    def gathered_input(self, inp: torch.Tensor) -> torch.Tensor:
        """What the product takes: the whole sequence."""
        if self.mode == "column" and self.sequence:
            return gather_along_first_dim(inp, self.group)
        return inp

    def reduced_output(self, out: torch.Tensor) -> torch.Tensor:
        """What the layer gives, from this rank's product."""
        if self.mode != "row":
            return out
        if self.sequence:
            return reduce_scatter_along_first_dim(out, self.group)
        return all_reduce(out, self.group)

    def gathered_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The transpose of :meth:`reduced_output`."""
        if self.mode == "row" and self.sequence:
            return gather_along_first_dim(grad, self.group)
        return grad

    def reduced_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The transpose of :meth:`gathered_input` (for "column" without ``sequence``: of the
        identity whose input every rank has)."""
        if self.mode != "column":
            return grad
        if self.sequence:
            return reduce_scatter_along_first_dim(grad, self.group)
        return all_reduce(grad, self.group)


def weight_gradient(weight: torch.Tensor, gradient: torch.Tensor, accumulate: bool) -> torch.Tensor:
    """The gradient of ``weight``; with ``accumulate`` it is added to ``weight.main_grad`` instead.

    megatron-core's data parallelism reads ``grad_added_to_main_grad`` to know which happened.
    """
    main = getattr(weight, "main_grad", None)
    if not accumulate or main is None:
        return gradient
    main.add_(gradient)
    vars(weight)["grad_added_to_main_grad"] = True
    return get_dummy_wgrad(list(weight.shape), weight.dtype)


class _Linear(torch.autograd.Function):
    """``inp @ weight.T + bias`` with the communication of tensor parallelism."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        inp: torch.Tensor,
        bias: torch.Tensor | None,
        parallelism: Parallelism,
        fuse_wgrad_accumulation: bool,
    ) -> torch.Tensor:
        """[..., in] to [..., out]; ``ctx`` is None where no gradient is wanted."""
        # The bias of a row-parallel layer is added once, after the sum over the ranks.
        late_bias = bias if parallelism.mode == "row" else None
        early_bias = None if parallelism.mode == "row" else bias
        out = general_gemm(weight, parallelism.gathered_input(inp), bias=early_bias)[0]
        out = parallelism.reduced_output(out)
        if late_bias is not None:
            out = out + late_bias
        if ctx is not None:
            # A gathered input is gathered again in the backward pass: 1 / n of the memory.
            ctx.save_for_backward(inp, weight)
            ctx.parallelism = parallelism
            ctx.fuse = fuse_wgrad_accumulation
            ctx.parameter = weight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inp, weight = ctx.saved_tensors
        parallelism: Parallelism = ctx.parallelism
        needs_weight, needs_inp, needs_bias = ctx.needs_input_grad[:3]
        grad = grads[0]
        bias_gradient = None
        if needs_bias and parallelism.mode == "row":
            bias_gradient = grad.flatten(0, -2).sum(0)
        grad = parallelism.gathered_gradient(grad)
        if needs_bias and parallelism.mode != "row":
            bias_gradient = grad.flatten(0, -2).sum(0)
        inp_gradient = None
        if needs_inp:
            product = general_gemm(weight, grad, layout="NN")[0]
            inp_gradient = parallelism.reduced_gradient(product)
        gradient = None
        if needs_weight:
            product = general_gemm(parallelism.gathered_input(inp), grad, layout="NT")[0]
            gradient = weight_gradient(ctx.parameter, product, ctx.fuse)
        return gradient, inp_gradient, bias_gradient, None, None


class Linear(TransformerEngineBaseModule):
    """A linear layer whose weight is ``[out, in]``, this rank's part of it.

    ``in_features`` and ``out_features`` are given for the whole layer; the attributes of these
    names hold this rank's part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: dist.ProcessGroup | None = None,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Device = "cpu",
        rng_tracker_name: str | None = None,
        **ignored: Any,
    ) -> None:
        """Arguments of communication overlap and of FP8 have no effect.

        Raises:
            ValueError: if the group's size does not divide the features.
        """
        super().__init__()
        self.tp_group = tp_group
        self.tp_size = tp_group.size() if tp_group is not None else tp_size
        self.parallel_mode = parallel_mode
        self.in_features = self._part("in_features", in_features, parallel_mode == "row")
        self.out_features = self._part("out_features", out_features, parallel_mode == "column")
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        # Always so here; extensions/transformer_engine.py:3571 insists on the attribute.
        self.save_original_input = True
        shape = (self.out_features, self.in_features)
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
        fill(self.weight, init_method, get_rng_state_tracker, rng_tracker_name)
        row = parallel_mode == "row"
        mark(self.weight, parallel_mode is not None, 1 if row else 0, False)
        self.bias: torch.nn.Parameter | None
        self.register_parameter("bias", None)
        if bias:
            self.bias = torch.nn.Parameter(
                torch.zeros(self.out_features, dtype=params_dtype, device=device)
            )
            mark(self.bias, parallel_mode == "column", 0, row and self.sequence_parallel)

    def _part(self, name: str, features: int, split: bool) -> int:
        if not split:
            return features
        if features % self.tp_size:
            raise ValueError(f"{name}={features} is not divisible by tp_size={self.tp_size}")
        return features // self.tp_size

    def forward(
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, **ignored: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """[..., in] to [..., out], or (that without the bias, bias) with ``return_bias``.

        With sequence parallelism the first dimension is split over the ranks on the input side
        ("column") or on the output side ("row").
        """
        out = call(
            _Linear,
            self.weight,
            inp,
            self.bias if self.apply_bias else None,
            Parallelism(self.parallel_mode, self.sequence_parallel, self.tp_group),
            self.fuse_wgrad_accumulation,
        )
        return (out, self.bias) if self.return_bias else out
