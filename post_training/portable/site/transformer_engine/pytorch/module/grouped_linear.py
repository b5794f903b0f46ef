"""Several linear layers of one shape, each applied to its rows: the experts of a mixture.

megatron-core derives TEGroupedLinear from it (extensions/transformer_engine.py:2106). ModelOpt's
plugin finds :class:`_GroupedLinear` here, looks for ``inp`` in its signature and takes the last
``2 * num_gemms`` arguments for weights and biases (quantization/plugins/transformer_engine.py:259).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from transformer_engine.pytorch.module.base import (
    Device,
    TransformerEngineBaseModule,
    call,
    fill,
    mark,
)
from transformer_engine.pytorch.module.linear import weight_gradient

__all__ = ["GroupedLinear"]


class _GroupedLinear(torch.autograd.Function):
    """Row blocks of ``inp``, each times its own weight."""

    @staticmethod
    def forward(
        ctx: Any,
        inp: torch.Tensor,
        m_splits: list[int],
        fuse_wgrad_accumulation: bool,
        *weights_and_biases: Any,
    ) -> torch.Tensor:
        """[sum(m_splits), in] to [sum(m_splits), out]; ``ctx`` is None where no gradient is
        wanted. The weights come first, then as many biases, None where there are none."""
        count = len(weights_and_biases) // 2
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        parts = zip(inp.split(m_splits), weights, biases, strict=True)
        out = torch.cat([F.linear(part, weight, bias) for part, weight, bias in parts])
        if ctx is not None:
            ctx.save_for_backward(inp, *weights)
            ctx.m_splits = m_splits
            ctx.fuse = fuse_wgrad_accumulation
            ctx.parameters = weights
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inp, *weights = ctx.saved_tensors
        count = len(weights)
        parts = grads[0].split(ctx.m_splits)
        inp_gradient = None
        if ctx.needs_input_grad[0]:
            inp_gradient = torch.cat([g @ w for g, w in zip(parts, weights, strict=True)])
        gradients: list[torch.Tensor | None] = []
        needed = ctx.needs_input_grad[3:]
        for index, (rows, grad) in enumerate(zip(inp.split(ctx.m_splits), parts, strict=True)):
            gradient = None
            if needed[index]:
                gradient = weight_gradient(ctx.parameters[index], grad.t() @ rows, ctx.fuse)
            gradients.append(gradient)
        for index, grad in enumerate(parts):
            gradients.append(grad.sum(0) if needed[count + index] else None)
        return inp_gradient, None, None, *gradients


class GroupedLinear(TransformerEngineBaseModule):
    """``num_gemms`` linear layers with parameters ``weight0``.. [out, in] and ``bias0``.. [out].

    extensions/transformer_engine.py:2466 reads the attributes ``fp8*`` when it splits the extra
    state by expert, :2262 calls :meth:`init_fp8_metadata` when a checkpoint is loaded.
    """

    fp8 = False
    fp8_calibration = False

    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        fuse_wgrad_accumulation: bool = False,
        tp_size: int = 1,
        get_rng_state_tracker: Callable[[], Any] | None = None,
        rng_tracker_name: str | None = None,
        init_method: Callable[[torch.Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Device = "cpu",
        **ignored: Any,
    ) -> None:
        """As :class:`Linear`, for experts: megatron-core does their communication itself.

        Raises:
            NotImplementedError: for ``tp_size`` above 1.
        """
        super().__init__()
        if tp_size > 1:
            raise NotImplementedError("GroupedLinear of the stand-in has no tensor parallelism")
        self.fp8_meta = {"fp8_checkpoint": False}
        self.num_gemms = num_gemms
        self.in_features = in_features
        self.out_features = out_features
        self.tp_size = tp_size
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        # Always so here; extensions/transformer_engine.py:3571 insists on the attribute.
        self.save_original_input = True
        for index in range(num_gemms):
            weight = torch.nn.Parameter(
                torch.empty(out_features, in_features, dtype=params_dtype, device=device)
            )
            fill(weight, init_method, get_rng_state_tracker, rng_tracker_name)
            mark(weight, parallel_mode is not None, 1 if parallel_mode == "row" else 0, False)
            self.register_parameter(f"weight{index}", weight)
            if bias:
                zeros = torch.zeros(out_features, dtype=params_dtype, device=device)
                parameter = torch.nn.Parameter(zeros)
                mark(parameter, parallel_mode == "column", 0, False)
                self.register_parameter(f"bias{index}", parameter)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        """There is no FP8 state to initialise."""

    def forward(
        self,
        inp: torch.Tensor,
        m_splits: list[int] | torch.Tensor,
        is_first_microbatch: bool | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[torch.Tensor | None]]:
        """[sum(m_splits), in] to [sum(m_splits), out], or (that without biases, biases)."""
        if isinstance(m_splits, torch.Tensor):
            m_splits = m_splits.tolist()
        weights = [getattr(self, f"weight{index}") for index in range(self.num_gemms)]
        biases = [getattr(self, f"bias{index}", None) for index in range(self.num_gemms)]
        applied = biases if self.apply_bias else [None] * self.num_gemms
        out = call(_GroupedLinear, inp, m_splits, self.fuse_wgrad_accumulation, *weights, *applied)
        return (out, biases) if self.return_bias else out
