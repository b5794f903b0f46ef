"""The training loop, on megatron-core's DDP, distributed optimizer and pipeline schedules.

It knows nothing of what is trained: a :class:`Task` computes the loss, parameters that require a
gradient are trained, and everything else is here: gradient accumulation, schedule, clipping,
evaluation, logging, checkpoints, going on after an interruption, and ending in time.

    trainer = Trainer(model, task, options, session, checkpoints)
    outcome = trainer.run(data, valid)

On the CPU a run that was killed at any moment and started again writes the same losses, to the
last bit, as one that was not: order of the data, random states, optimizer and the sums of the
current log line are all in the checkpoint.
"""

from __future__ import annotations

import logging
import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from post_training.common.errors import UsageError
from post_training.distributed import placement, signals
from post_training.training import setup as training_setup
from post_training.training.checkpoint import FOLDER, Progress, TrainingCheckpoints
from post_training.training.metrics import Metrics
from post_training.training.options import TrainingOptions
from post_training.training.sampler import Batches, Order, Samples

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer import MegatronModule

    from post_training.distributed.session import Session

logger = logging.getLogger("post_training")

# Sum of the loss over its tokens, their number (int), and of each metric [sum, count].
Loss = tuple["torch.Tensor", "torch.Tensor", "dict[str, torch.Tensor]"]
LossFunction = Callable[["torch.Tensor"], Loss]


def _nothing(_model: Any) -> None:
    pass


@dataclass(frozen=True)
class Task:
    """What is trained.

    Attributes:
        forward_step: from this rank's model and a micro batch to the stage's output and, for the
            last pipeline stage, a function from that output to the :data:`Loss`. The loss is a sum
            over tokens: the loop divides by all tokens of the iteration, so that the result does
            not depend on how it is cut into micro batches.
        metric_names: names in the third part of the loss, the same on every rank; the last
            pipeline stage gives each as a tensor [sum, count].
        set_mode: puts the model into the mode in which it is trained and evaluated.
        adjust_tensor_shapes: as megatron-core's schedules take it, where stages exchange more than
            hidden states.
    """

    forward_step: Callable[[Any, Mapping[str, Any]], tuple[Any, LossFunction]]
    metric_names: tuple[str, ...] = ()
    set_mode: Callable[[Any], None] = _nothing
    adjust_tensor_shapes: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after which iteration, whether that was the last, and the last metrics."""

    iteration: int
    finished: bool
    metrics: dict[str, float]
    manifest: dict[str, Any] | None = None


class Trainer:
    """One run.

    Args:
        model: this rank's part; its parameters with ``requires_grad`` are trained.
        task: what it is trained for.
        options: how.
        session: the process.
        checkpoints: where it is saved; a run found there is continued.
        resume: whether there is a run to go on with, whose weights ``model`` has already.
        evaluate: further metrics at each evaluation, from the iteration; every rank calls it.
    """

    def __init__(
        self,
        model: MegatronModule,
        task: Task,
        options: TrainingOptions,
        session: Session,
        checkpoints: TrainingCheckpoints,
        *,
        resume: bool = False,
        evaluate: Callable[[int], Mapping[str, float]] | None = None,
    ) -> None:
        self.model = model
        self.task = task
        self.options = options
        self.session = session
        self.checkpoints = checkpoints
        self._evaluate_more = evaluate
        self._names = ("loss", *task.metric_names)
        task.set_mode(model)
        parts = training_setup.build(model, options)
        self.ddp, self.optimizer, self._scheduler = parts.ddp, parts.optimizer, parts.scheduler
        self._forward_backward = parts.forward_backward
        self.progress = Progress(options=options.decides_results())
        if resume:
            self.progress = checkpoints.load(model, self.optimizer)
            self._say_what_differs()
        self._scheduler.step(self.progress.iteration)
        # What is known last of each metric; evaluations' names begin with eval_.
        self.metrics: dict[str, float] = {}
        self._window = self._new_sums()
        for i, name in enumerate(self._names):
            if self.progress.window and name in self.progress.window:
                self._window[i] = self._window.new_tensor(self.progress.window[name])

    def run(self, data: Samples, valid: Samples | None = None) -> Outcome:
        """Train to the last iteration, or until a signal or a limit ends the run.

        Raises:
            UsageError: if the loss is not a number any more; the last checkpoint stays.
        """
        first = self.progress.iteration
        metrics = None
        if self.session.is_main:
            folder = self.checkpoints.folder / FOLDER
            board = self.options.tensorboard_dir
            from pathlib import Path

            metrics = Metrics(
                folder,
                first,
                self.options.train_iters,
                show_progress=self.session.show_progress,
                tensorboard=Path(board) if board else None,
                title=self.session.stage,
            )
        try:
            with signals.deferred():
                return self._loop(data, valid, metrics)
        finally:
            if metrics is not None:
                metrics.close()

    def _loop(
        self,
        data: Samples,
        valid: Samples | None,
        metrics: Metrics | None,
    ) -> Outcome:
        options = self.options
        batches = iter(self._batches(data, self.progress.samples, shuffle=True))
        started, begun = time.monotonic(), self.progress.seconds
        logged, logged_at = time.monotonic(), self.progress.iteration
        saved = self.progress.iteration
        content = None
        iteration = self.progress.iteration
        while iteration < options.train_iters:
            asked = signals.asked_to_end() or self._is_late(started)
            grad_norm, lr, stop = self._step(batches, asked)
            iteration += 1
            now = time.monotonic()
            self.progress = Progress(
                iteration,
                self.progress.samples + options.global_batch_size,
                None,
                options.decides_results(),
                begun + now - started,
            )
            if metrics is not None:
                metrics.advance()
            at_end = iteration == options.train_iters
            if iteration % options.log_interval == 0 or at_end:
                values = self._averages(self._window)
                self._require_finite(values, iteration)
                tokens = (iteration - logged_at) * options.global_batch_size * options.seq_length
                values |= {
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "tokens_per_second": tokens / max(now - logged, 1e-9),
                    "memory_bytes": float(self._memory()),
                    "seconds": self.progress.seconds,
                }
                self.metrics |= values
                if metrics is not None:
                    metrics.log("train", iteration, self.progress.samples, values)
                self._window.zero_()
                logged, logged_at = time.monotonic(), iteration
            if iteration % options.eval_interval == 0 or at_end:
                before = time.monotonic()
                values = self.evaluate(valid, iteration)
                self.metrics |= {f"eval_{name}": value for name, value in values.items()}
                if metrics is not None and values:
                    metrics.log("eval", iteration, self.progress.samples, values)
                logged += time.monotonic() - before
            interval = options.exit_interval
            stop = stop or (interval is not None and iteration % interval == 0)
            if iteration % options.save_interval == 0 or at_end or stop:
                before = time.monotonic()
                content = self._save()
                saved = iteration
                logged += time.monotonic() - before
            if stop:
                break
        if saved != iteration:
            content = self._save()
        return Outcome(iteration, iteration >= options.train_iters, self.metrics, content)

    def evaluate(self, valid: Samples | None, iteration: int) -> dict[str, float]:
        """Averages over the first ``eval_iters`` global batches of ``valid``, and further metrics.

        The model stays in the mode it is trained in: megatron-core's attention chooses its mask by
        it.
        """
        import torch

        values: dict[str, float] = {}
        if valid is not None and self.options.eval_iters and len(valid):
            sums = self._new_sums()
            count = -(-len(valid) // self.options.global_batch_size)
            batches = iter(self._batches(valid, 0, shuffle=False))
            with torch.no_grad():
                for _ in range(min(self.options.eval_iters, count)):
                    self._pass(batches, sums, forward_only=True)
            self._reduce(sums)
            values |= self._averages(sums)
        if self._evaluate_more is not None:
            values |= self._evaluate_more(iteration)
            self.task.set_mode(self.model)
        return values

    def _batches(self, data: Samples, start: int, shuffle: bool) -> Iterable[Mapping[str, Any]]:
        from megatron.core import parallel_state

        return Batches(
            data,
            Order(len(data), self.options.seed, shuffle),
            start=start,
            global_batch=self.options.global_batch_size,
            micro_batch=self.options.micro_batch_size,
            rank=parallel_state.get_data_parallel_rank(),
            ranks=parallel_state.get_data_parallel_world_size(),
            device=self.session.device,
        )

    def _step(self, batches: Iterator[Any], stop: bool) -> tuple[float, float, bool]:
        """One iteration. Returns the gradient's norm, the rate used, and whether to stop."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = max((group["lr"] for group in self.optimizer.param_groups), default=0.0)
        sums = self._new_sums()
        self._pass(batches, sums, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        self._scheduler.step(1)
        # One exchange for everything that ranks must agree on.
        extra = sums.new_tensor([[float(stop), 0.0]])
        everything = self._reduce(sums, extra)
        self._window += everything[: len(sums)]
        values = sums.new_tensor([float(grad_norm or 0.0), lr])
        return (*self._largest(values), bool(everything[-1, 0] > 0))

    def _pass(self, batches: Iterator[Any], sums: torch.Tensor, forward_only: bool) -> None:
        """Forward (and backward) over the micro batches of an iteration; adds to ``sums``."""
        from megatron.core import parallel_state

        def forward_step(iterator: Iterator[Any], model: Any, *_: Any) -> tuple[Any, Any]:
            output, loss_function = self.task.forward_step(model, next(iterator))

            def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Loss]:
                found = loss_function(output)
                return found[0], found[1].int(), found

            return output, loss

        options = self.options
        ranks = parallel_state.get_data_parallel_world_size()
        more = {}
        if self.task.adjust_tensor_shapes is not None and self.session.parallel.pipeline > 1:
            more["adjust_tensor_shapes_fn"] = self.task.adjust_tensor_shapes
        found: list[Loss] = self._forward_backward(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=[self.ddp],
            num_microbatches=options.global_batch_size // (options.micro_batch_size * ranks),
            seq_length=options.seq_length,
            micro_batch_size=options.micro_batch_size,
            forward_only=forward_only,
            **more,
        )
        # Tensor-parallel ranks have the same losses: one of them speaks.
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            for loss, tokens, metrics in found:
                sums[0, 0] += loss.detach().double()
                sums[0, 1] += tokens
                for i, name in enumerate(self.task.metric_names, start=1):
                    sums[i] += metrics[name].detach().double()

    def _new_sums(self) -> torch.Tensor:
        import torch

        shape = (len(self._names), 2)
        return torch.zeros(shape, dtype=torch.float64, device=self.session.device)

    def _reduce(self, sums: torch.Tensor, extra: torch.Tensor | None = None) -> torch.Tensor:
        import torch

        everything = sums if extra is None else torch.cat([sums, extra])
        if self.session.world > 1:
            torch.distributed.all_reduce(everything)
        return everything

    def _largest(self, values: torch.Tensor) -> tuple[float, float]:
        """Stages without trained parameters know neither norm nor rate."""
        import torch

        if self.session.parallel.pipeline > 1:
            torch.distributed.all_reduce(values, op=torch.distributed.ReduceOp.MAX)
        first, second = values.tolist()
        return first, second

    def _averages(self, sums: torch.Tensor) -> dict[str, float]:
        pairs = zip(self._names, sums.tolist(), strict=True)
        return {name: total / count if count else 0.0 for name, (total, count) in pairs}

    def _save(self) -> dict[str, Any] | None:
        import torch

        window = dict(zip(self._names, self._window.tolist(), strict=True))
        # megatron-core compares what ranks save in common, and their clocks differ.
        seconds = self._window.new_tensor([self.progress.seconds])
        if self.session.world > 1:
            torch.distributed.broadcast(seconds, 0)
        self.progress = replace(self.progress, window=window, seconds=seconds.item())
        content = self.checkpoints.save(self.model, self.optimizer, self.progress)
        self.task.set_mode(self.model)
        if self.session.is_main:
            placement.note_saved(self.progress.iteration)
        logger.info("saved iteration %d to %s", self.progress.iteration, self.checkpoints.folder)
        return content

    def _is_late(self, started: float) -> bool:
        limit = self.options.exit_duration_in_mins
        return limit is not None and time.monotonic() - started >= 60 * limit

    def _memory(self) -> int:
        import torch

        if self.session.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _require_finite(self, values: Mapping[str, float], iteration: int) -> None:
        if not math.isfinite(values["loss"]):
            raise UsageError(
                f"training iteration {iteration}: loss {values['loss']}",
                "it is not a number any more: the learning rate is too high, or the data is broken",
                f"lower --lr (it is {self.options.lr}); the last checkpoint is untouched",
            )

    def _say_what_differs(self) -> None:
        before = self.progress.options or {}
        now = self.options.decides_results()
        changed = [
            f"{name} was {before[name]} and is {value}"
            for name, value in now.items()
            if name in before and before[name] != value
        ]
        logger.info("going on after iteration %d", self.progress.iteration)
        if changed:
            logger.warning("other options than before the interruption: %s", "; ".join(changed))
