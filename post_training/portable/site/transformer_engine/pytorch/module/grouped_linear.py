"""Several linear layers of one shape, each applied to its rows: the experts of a mixture.

megatron-core derives TEGroupedLinear from it (extensions/transformer_engine.py:2106). ModelOpt's
plugin finds :class:`_GroupedLinear` here, looks for ``inp`` in its signature and takes the last
``2 * num_gemms`` arguments for weights and biases (quantization/plugins/transformer_engine.py:259).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

from transformer_engine.pytorch.module.base import call
from transformer_engine.pytorch.module.linear import LinearBase


class _GroupedLinear(torch.autograd.Function):
    """Row blocks of ``inp``, each times its own weight."""

    @staticmethod
    def forward(
        ctx: Any, inp: torch.Tensor, m_splits: list[int], *weights_and_biases: Any
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
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inp, *weights = ctx.saved_tensors
        needs_inp, _, *needs = ctx.needs_input_grad
        needs_weights, needs_biases = needs[: len(weights)], needs[len(weights) :]
        parts = grads[0].split(ctx.m_splits)
        inp_gradient = None
        if needs_inp:
            inp_gradient = torch.cat([g @ w for g, w in zip(parts, weights, strict=True)])
        of_weights = [
            grad.t() @ rows if need else None
            for rows, grad, need in zip(inp.split(ctx.m_splits), parts, needs_weights, strict=True)
        ]
        of_biases = [
            grad.sum(0) if need else None for grad, need in zip(parts, needs_biases, strict=True)
        ]
        return inp_gradient, None, *of_weights, *of_biases


class GroupedLinear(LinearBase):
    """``num_gemms`` linear layers with parameters ``weight0``.. [out, in] and ``bias0``.. [out].

    extensions/transformer_engine.py:2466 reads the attributes ``fp8*`` when it splits the extra
    state by expert, :2262 calls :meth:`init_fp8_metadata` when a checkpoint is loaded.
    """

    fp8 = False
    fp8_calibration = False

    def __init__(self, num_gemms: int, in_features: int, out_features: int, **options: Any) -> None:
        """As :class:`LinearBase`, for experts: megatron-core does their communication itself.

        Raises:
            NotImplementedError: for ``tp_size`` above 1.
        """
        if options.get("tp_size", 1) > 1:
            raise NotImplementedError("GroupedLinear of the stand-in has no tensor parallelism")
        suffixes = [str(index) for index in range(num_gemms)]
        super().__init__(in_features, out_features, suffixes=suffixes, **options)
        self.num_gemms = num_gemms
        self.fp8_meta = {"fp8_checkpoint": False}

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
        biases = [getattr(self, f"bias{index}") for index in range(self.num_gemms)]
        applied = biases if self.apply_bias else [None] * self.num_gemms
        out = call(_GroupedLinear, inp, m_splits, *weights, *applied)
        return (out, biases) if self.return_bias else out
