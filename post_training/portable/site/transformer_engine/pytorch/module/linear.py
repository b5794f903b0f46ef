"""Linear layer, column- or row-parallel.

megatron-core derives TELinear from it (extensions/transformer_engine.py:855). ModelOpt's plugin
finds :class:`_Linear` here and reads its signature for ``weight`` and ``inp``
(quantization/plugins/transformer_engine.py:85-106).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from transformer_engine.pytorch.module.base import Device, TransformerEngineBaseModule, call


@dataclass(frozen=True)
class Parallelism:
    """How a linear is split over ranks, and the communication that follows.

    Attributes:
        mode: "column" (output features split), "row" (input features split) or None.
        sequence: whether activations outside the layer are split along their first dimension;
            only with several ranks.
        group: the ranks; None for one.
    """

    mode: str | None
    sequence: bool
    group: dist.ProcessGroup | None

    def gathered_input(self, inp: torch.Tensor) -> torch.Tensor:
        """What the product takes: the whole sequence."""
        return self._gather(inp) if self.mode == "column" and self.sequence else inp

    def reduced_output(self, out: torch.Tensor) -> torch.Tensor:
        """What the layer gives, from this rank's product."""
        return self._reduce(out) if self.mode == "row" else out

    def gathered_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The transpose of :meth:`reduced_output`."""
        return self._gather(grad) if self.mode == "row" and self.sequence else grad

    def reduced_gradient(self, grad: torch.Tensor) -> torch.Tensor:
        """The transpose of :meth:`gathered_input` (for "column" without ``sequence``: of the
        identity whose input every rank has)."""
        return self._reduce(grad) if self.mode == "column" else grad

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate the ranks' tensors: [s / n, ...] to [s, ...]."""
        gathered = tensor.new_empty(
            (tensor.shape[0] * dist.get_world_size(self.group), *tensor.shape[1:])
        )
        dist.all_gather_into_tensor(gathered, tensor.contiguous(), group=self.group)
        return gathered

    def _reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks; with ``sequence`` only this rank's part: [s, ...] to [s / n, ...]."""
        if self.group is None or self.group.size() == 1:
            return tensor
        tensor = tensor.contiguous()
        if not self.sequence:
            dist.all_reduce(tensor, group=self.group)
            return tensor
        part = tensor.new_empty((tensor.shape[0] // self.group.size(), *tensor.shape[1:]))
        dist.reduce_scatter_tensor(part, tensor, group=self.group)
        return part


class _Linear(torch.autograd.Function):
    """``inp @ weight.T + bias`` with the communication of tensor parallelism."""

    @staticmethod
    def forward(
        ctx: Any,
        weight: torch.Tensor,
        inp: torch.Tensor,
        bias: torch.Tensor | None,
        parallelism: Parallelism,
    ) -> torch.Tensor:
        """[..., in] to [..., out]; ``ctx`` is None where no gradient is wanted."""
        # The bias of a row-parallel layer is added once, after the sum over the ranks.
        late = parallelism.mode == "row"
        out = F.linear(parallelism.gathered_input(inp), weight, None if late else bias)
        out = parallelism.reduced_output(out)
        if late and bias is not None:
            out = out + bias
        if ctx is not None:
            # A gathered input is gathered again in the backward pass: 1 / n of the memory.
            ctx.save_for_backward(inp, weight)
            ctx.parallelism = parallelism
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        inp, weight = ctx.saved_tensors
        needs_weight, needs_inp, needs_bias = ctx.needs_input_grad[:3]
        weight_gradient = inp_gradient = bias_gradient = None
        if needs_bias:
            bias_gradient = grads[0].flatten(0, -2).sum(0)
        grad = ctx.parallelism.gathered_gradient(grads[0])
        if needs_inp:
            inp_gradient = ctx.parallelism.reduced_gradient(grad.matmul(weight))
        if needs_weight:
            gathered = ctx.parallelism.gathered_input(inp)
            weight_gradient = grad.flatten(0, -2).t().matmul(gathered.flatten(0, -2))
        return weight_gradient, inp_gradient, bias_gradient, None


class LinearBase(TransformerEngineBaseModule):
    """Options and parameters of linear layers; a weight is ``[out, in]``, this rank's part of it.

    ``in_features`` and ``out_features`` are given for the whole layer; the attributes of these
    names hold this rank's part.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
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
        suffixes: Sequence[str] = ("",),
        **ignored: Any,
    ) -> None:
        """Arguments of communication overlap, of FP8 and of fused gradient accumulation have no
        effect. There is a ``weight`` and a ``bias`` for each of ``suffixes``.

        Raises:
            ValueError: if the group's size does not divide the features.
        """
        super().__init__()
        self.tp_group = tp_group
        self.tp_size = tp_group.size() if tp_group is not None else tp_size
        self.parallel_mode = parallel_mode
        row, column = parallel_mode == "row", parallel_mode == "column"
        self.in_features = self._part("in_features", in_features, row)
        self.out_features = self._part("out_features", out_features, column)
        self.sequence_parallel = self.tp_size > 1 and sequence_parallel
        self.use_bias = bias
        self.return_bias = return_bias
        self.apply_bias = bias and not return_bias
        # Always so here; extensions/transformer_engine.py:3571 insists on the attribute.
        self.save_original_input = True
        kind: dict[str, Any] = {"dtype": params_dtype, "device": device}
        for suffix in suffixes:
            weight = torch.nn.Parameter(torch.empty(self.out_features, self.in_features, **kind))
            _fill(weight, init_method, get_rng_state_tracker, rng_tracker_name)
            _mark(weight, parallel_mode is not None, 1 if row else 0, False)
            self.register_parameter(f"weight{suffix}", weight)
            self.register_parameter(f"bias{suffix}", None)
            if bias:
                zeros = torch.nn.Parameter(torch.zeros(self.out_features, **kind))
                _mark(zeros, column, 0, row and self.sequence_parallel)
                self.register_parameter(f"bias{suffix}", zeros)

    def _part(self, name: str, features: int, split: bool) -> int:
        if not split:
            return features
        if features % self.tp_size:
            raise ValueError(f"{name}={features} is not divisible by tp_size={self.tp_size}")
        return features // self.tp_size


class Linear(LinearBase):
    """A linear layer with parameters ``weight`` and ``bias``."""

    weight: torch.nn.Parameter
    bias: torch.nn.Parameter | None

    def forward(
        self, inp: torch.Tensor, is_first_microbatch: bool | None = None, **ignored: Any
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """[..., in] to [..., out], or (that without the bias, bias) with ``return_bias``.

        With sequence parallelism the first dimension is split over the ranks on the input side
        ("column") or on the output side ("row").
        """
        bias = self.bias if self.apply_bias else None
        split = Parallelism(self.parallel_mode, self.sequence_parallel, self.tp_group)
        out = call(_Linear, self.weight, inp, bias, split)
        return (out, self.bias) if self.return_bias else out


def _fill(
    parameter: torch.nn.Parameter,
    init_method: Callable[[torch.Tensor], Any] | None,
    get_rng_state_tracker: Callable[[], Any] | None,
    rng_tracker_name: str | None,
) -> None:
    """Initialise ``parameter`` in place, with the tracker's state if there is one."""
    if parameter.is_meta:
        return
    context: Any = contextlib.nullcontext()
    if get_rng_state_tracker is not None:
        tracker = get_rng_state_tracker()
        context = tracker.fork(rng_tracker_name) if rng_tracker_name else tracker.fork()
    with torch.no_grad(), context:
        if init_method is not None:
            init_method(parameter)
        else:
            torch.nn.init.normal_(parameter, mean=0.0, std=0.023)


def _mark(
    parameter: torch.nn.Parameter, parallel: bool, dimension: int, sequence_parallel: bool
) -> None:
    """Set the attributes by which megatron-core knows how a parameter is split."""
    vars(parameter).update(
        tensor_model_parallel=parallel,
        partition_dim=dimension,
        partition_stride=1,
        sequence_parallel=sequence_parallel,
    )
