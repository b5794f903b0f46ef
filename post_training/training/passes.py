"""Forward and backward passes over the micro batches of an iteration, and the sums of their losses.

Sums are float64 [1 + metrics, 2]: for the loss and each metric of the task its sum and its count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from post_training.training.options import TrainingOptions
from post_training.training.sampler import Order, Samples, micro_batches
from post_training.training.task import Loss, Task

if TYPE_CHECKING:
    import torch

    from post_training.distributed.session import Session


class Passes:
    """The passes of one run.

    Args:
        ddp: this rank's part of the model, in megatron-core's DDP.
        task: what is trained.
        options: of the run.
        session: the process's.
    """

    def __init__(
        self,
        ddp: Any,
        task: Task,
        options: TrainingOptions,
        session: Session,
    ) -> None:
        self.names = ("loss", *task.metric_names)
        self._ddp = ddp
        self._task = task
        self._options = options
        self._session = session

    def batches(self, data: Samples, start: int, shuffle: bool) -> Iterator[Any]:
        """This rank's micro batches of ``data``, from sample number ``start`` on."""
        from megatron.core import parallel_state

        return micro_batches(
            data,
            Order(len(data), self._options.seed, shuffle),
            start=start,
            micro_batch=self._options.micro_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            device=self._session.device,
        )

    def run(self, batches: Iterator[Any], sums: torch.Tensor, forward_only: bool) -> None:
        """Forward (and backward) over the micro batches of an iteration; adds to ``sums``."""
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import get_forward_backward_func

        options = self._options
        ranks = parallel_state.get_data_parallel_world_size()
        more = {}
        if self._task.adjust_tensor_shapes is not None and self._session.parallel.pipeline > 1:
            more["adjust_tensor_shapes_fn"] = self._task.adjust_tensor_shapes
        found: list[Loss] = get_forward_backward_func()(
            forward_step_func=self._forward_step,
            data_iterator=batches,
            model=[self._ddp],
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
                for i, name in enumerate(self._task.metric_names, start=1):
                    sums[i] += metrics[name].detach().double()

    def _forward_step(self, iterator: Iterator[Any], model: Any, *_: Any) -> tuple[Any, Any]:
        output, loss_function = self._task.forward_step(model, next(iterator))

        def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Loss]:
            found = loss_function(output)
            return found[0], found[1].int(), found

        return output, loss

    def new_sums(self) -> torch.Tensor:
        """Zeros."""
        import torch

        return torch.zeros(len(self.names), 2, dtype=torch.float64, device=self._session.device)

    def reduce(self, sums: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
        """Sums over all ranks, in place; with ``extra`` rows a new tensor [1 + metrics + n, 2]."""
        import torch

        everything = sums if extra is None else torch.cat([sums, extra])
        if self._session.world > 1:
            torch.distributed.all_reduce(everything)
        return everything

    def averages(self, sums: torch.Tensor) -> dict[str, float]:
        """Sum by count of each name; 0 where nothing was counted."""
        pairs = zip(self.names, sums.tolist(), strict=True)
        return {name: total / count if count else 0.0 for name, (total, count) in pairs}

    def largest(self, values: torch.Tensor) -> list[float]:
        """The maximum over the pipeline stages, of which some train nothing and know no norm."""
        import torch

        if self._session.parallel.pipeline > 1:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        found: list[float] = values.tolist()
        return found
