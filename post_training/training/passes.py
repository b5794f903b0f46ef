"""Forward and backward passes over the micro batches of an iteration, and the sums of their losses.

Sums are float64 [1 + metrics, 2]: for the loss and each metric of the task its sum and its count.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from post_training.distributed.session import Session
from post_training.training.options import TrainingOptions
from post_training.training.sampler import Order, Samples, micro_batches
from post_training.training.task import Loss, Task


@dataclass(frozen=True)
class Passes:
    """The passes of one run; ``ddp`` is this rank's part of the model, in megatron-core's DDP."""

    ddp: Any
    task: Task
    options: TrainingOptions
    session: Session

    @property
    def names(self) -> tuple[str, ...]:
        return ("loss", *self.task.metric_names)

    def batches(self, data: Samples, start: int, shuffle: bool) -> Iterator[Any]:
        """This rank's micro batches of ``data``, from sample number ``start`` on."""
        return micro_batches(
            data,
            Order(len(data), self.options.seed, shuffle),
            start=start,
            micro_batch=self.options.micro_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            device=self.session.device,
        )

    def run(self, batches: Iterator[Any], sums: torch.Tensor, forward_only: bool) -> None:
        """Forward (and backward) over the micro batches of an iteration; adds to ``sums``."""
        options, parallel = self.options, self.session.parallel
        ranks = parallel_state.get_data_parallel_world_size()
        more = {}
        if self.task.adjust_tensor_shapes is not None and parallel.pipeline > 1:
            more["adjust_tensor_shapes_fn"] = self.task.adjust_tensor_shapes
        found: list[Loss] = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=[self.ddp],
            num_microbatches=options.global_batch_size // (options.micro_batch_size * ranks),
            seq_length=options.seq_length,
            micro_batch_size=options.micro_batch_size,
            forward_only=forward_only,
            **more,
        )
        # Tensor-parallel ranks have the same losses: the first one reports them.
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for loss, tokens, metrics in found:
                sums[0, 0] += loss.detach().double()
                sums[0, 1] += tokens
                for i, name in enumerate(self.task.metric_names, start=1):
                    sums[i] += metrics[name].detach().double()

    def _forward_step(self, iterator: Iterator[Any], model: Any, *_: Any) -> tuple[Any, Any]:
        output, loss_function = self.task.forward_step(model, next(iterator))

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Loss]:
            found = loss_function(output)
            return found[0], found[1].int(), found

        return output, loss

    def new_sums(self) -> torch.Tensor:
        """Zeros."""
        return torch.zeros(len(self.names), 2, dtype=torch.float64, device=self.session.device)

    def reduce(self, sums: torch.Tensor) -> torch.Tensor:
        """Sums over all ranks, in place."""
        if self.session.world > 1:
            torch.distributed.all_reduce(sums)
        return sums

    def averages(self, sums: torch.Tensor) -> dict[str, float]:
        """Sum by count of each name; 0 where nothing was counted."""
        pairs = zip(self.names, sums.tolist(), strict=True)
        return {name: total / count if count else 0.0 for name, (total, count) in pairs}

    def largest(self, values: torch.Tensor) -> list[float]:
        """The maximum over the pipeline stages, of which some train nothing and know no norm."""
        if self.session.parallel.pipeline > 1:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        return values.tolist()
