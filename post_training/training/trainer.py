"""The training loop, on megatron-core's DDP, distributed optimizer and pipeline schedules.

It knows nothing of what is trained: a :class:`Task` computes the loss, parameters that require a
gradient are trained, and everything else is here: gradient accumulation, schedule, clipping,
evaluation, logging, checkpoints, resuming after an interruption, and ending in time.

    trainer = Trainer(model, task, options, session, checkpoints)
    result = trainer.run(data, valid)

On the CPU a run that was killed at any moment and resumed writes the same losses, to the last bit,
as one that was not: order of the data, random states, optimizer and the sums of the current log
line are all in the checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.transformer import MegatronModule

from post_training.common.errors import UsageError
from post_training.distributed import placement, signals
from post_training.distributed.collectives import on_first_rank
from post_training.distributed.session import Session
from post_training.training import setup
from post_training.training.checkpoint import Progress, TrainingCheckpoints
from post_training.training.metrics import Metrics
from post_training.training.options import TrainingOptions
from post_training.training.passes import Passes
from post_training.training.run_folder import FOLDER
from post_training.training.sampler import Samples
from post_training.training.task import Task

logger = logging.getLogger("post_training")


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended: after which iteration, whether that was the last, and the last metrics."""

    iteration: int
    finished: bool
    metrics: dict[str, float]
    manifest: dict[str, Any] | None = None


@dataclass
class Trainer:
    """One run.

    Attributes:
        model: this rank's part; its parameters with ``requires_grad`` are trained.
        resume: whether there is a run in ``checkpoints``, whose weights ``model`` has already.
        evaluate: further metrics at each evaluation, from the iteration; every rank calls it.
    """

    model: MegatronModule
    task: Task
    options: TrainingOptions
    session: Session
    checkpoints: TrainingCheckpoints
    resume: bool = False
    evaluate: Callable[[int], Mapping[str, float]] | None = None

    def __post_init__(self) -> None:
        self.task.set_mode(self.model)
        self.ddp, self.optimizer, self._scheduler = setup.build(self.model, self.options)
        self._passes = Passes(self.ddp, self.task, self.options, self.session)
        self.progress = Progress()
        if self.resume:
            self.progress = self.checkpoints.load(self.model, self.optimizer)
            self._log_differences()
        self.progress = replace(self.progress, options=self.options.decides_results())
        self._scheduler.step(self.progress.iteration)
        # What is known last of each metric; evaluations' names begin with eval_.
        self.metrics: dict[str, float] = {}
        self._window = self._passes.new_sums()
        for i, name in enumerate(self._passes.names):
            if self.progress.window and name in self.progress.window:
                self._window[i] = self._window.new_tensor(self.progress.window[name])
        self._written: Metrics | None = None  # on rank 0

    def run(self, data: Samples, valid: Samples | None = None) -> TrainingResult:
        """Train to the last iteration, or until a signal or a limit ends the run.

        Raises:
            UsageError: if the loss is no longer finite; the last checkpoint stays.
        """
        with contextlib.ExitStack() as stack:
            if self.session.is_main:
                self._written = Metrics(
                    self.checkpoints.folder / FOLDER,
                    self.progress.iteration,
                    self.options.train_iters,
                    show_progress=self.session.show_progress,
                    tensorboard=self.options.tensorboard_dir,
                    title=self.session.stage,
                )
                stack.callback(self._written.close)
            stack.enter_context(signals.deferred())
            return self._loop(data, valid)

    def _loop(self, data: Samples, valid: Samples | None) -> TrainingResult:
        options = self.options
        batches = self._passes.batches(data, self.progress.samples, shuffle=True)
        started, begun = time.monotonic(), self.progress.seconds
        iteration = logged_at = self.progress.iteration
        logged = started
        content = None
        while iteration < options.train_iters:
            asked = signals.asked_to_end() or self._is_late(started)
            grad_norm, lr, stop = self._step(batches, asked)
            iteration += 1
            now = time.monotonic()
            self.progress = replace(
                self.progress,
                iteration=iteration,
                samples=self.progress.samples + options.global_batch_size,
                seconds=begun + now - started,
            )
            if self._written is not None:
                self._written.bar.update()
            # A norm that is not finite has spoilt the weights already: they are not saved.
            self._require_finite(grad_norm, "norm of the gradient")
            at_end = iteration == options.train_iters
            if iteration % options.log_interval == 0 or at_end:
                values = self._passes.averages(self._window)
                self._require_finite(values["loss"])
                tokens = (iteration - logged_at) * options.global_batch_size * options.seq_length
                values |= {
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "tokens_per_second": tokens / max(now - logged, 1e-9),
                    "memory_bytes": float(self._memory()),
                    "seconds": self.progress.seconds,
                }
                self.metrics |= values
                self._write("train", values)
                self._window.zero_()
                logged, logged_at = time.monotonic(), iteration
            before = time.monotonic()
            if iteration % options.eval_interval == 0 or at_end:
                values = self._evaluate(valid, iteration)
                self.metrics |= {f"eval_{name}": value for name, value in values.items()}
                self._write("eval", values)
            interval = options.exit_interval
            stop = stop or (interval is not None and iteration % interval == 0)
            if iteration % options.save_interval == 0 or at_end or stop:
                content = self._save()
            logged += time.monotonic() - before
            if stop:
                break
        return TrainingResult(iteration, iteration >= options.train_iters, self.metrics, content)

    def _write(self, kind: str, values: Mapping[str, float]) -> None:
        if self._written is not None and values:
            self._written.log(kind, self.progress.iteration, self.progress.samples, values)

    def _evaluate(self, valid: Samples | None, iteration: int) -> dict[str, float]:
        """Averages over the first ``eval_iters`` global batches of ``valid``, and further metrics.

        The model stays in the mode it is trained in: megatron-core's attention chooses its mask by
        it.
        """
        values: dict[str, float] = {}
        if valid is not None and self.options.eval_iters and len(valid):
            sums = self._passes.new_sums()
            count = -(-len(valid) // self.options.global_batch_size)
            batches = self._passes.batches(valid, 0, shuffle=False)
            with torch.no_grad():
                for _ in range(min(self.options.eval_iters, count)):
                    self._passes.run(batches, sums, forward_only=True)
            values |= self._passes.averages(self._passes.reduce(sums))
        if self.evaluate is not None:
            values |= self.evaluate(iteration)
            self.task.set_mode(self.model)
        return values

    def _step(self, batches: Iterator[Any], stop: bool) -> tuple[float, float, bool]:
        """One iteration. Returns the gradient's norm, the rate used, and whether to stop."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()
        lr = max((group["lr"] for group in self.optimizer.param_groups), default=0.0)
        sums = self._passes.new_sums()
        self._passes.run(batches, sums, forward_only=False)
        _, grad_norm, _ = self.optimizer.step()
        self._scheduler.step(1)
        # One exchange for everything that ranks must agree on.
        everything = torch.cat([sums, sums.new_tensor([[float(stop), 0.0]])])
        self._window += self._passes.reduce(everything)[: len(sums)]
        grad_norm, lr = self._passes.largest(sums.new_tensor([float(grad_norm or 0.0), lr]))
        return grad_norm, lr, bool(everything[-1, 0] > 0)

    def _save(self) -> dict[str, Any]:
        window = dict(zip(self._passes.names, self._window.tolist(), strict=True))
        self._require_finite(self._passes.averages(self._window)["loss"])
        # megatron-core compares what ranks save in common, and their clocks differ.
        seconds = on_first_rank(lambda: self.progress.seconds)
        self.progress = replace(self.progress, window=window, seconds=seconds)
        content = self.checkpoints.save(self.model, self.optimizer, self.progress, self.metrics)
        self.task.set_mode(self.model)
        if self.session.is_main:
            placement.note_saved(self.progress.iteration)
        logger.info("saved iteration %d to %s", self.progress.iteration, self.checkpoints.folder)
        return content

    def _is_late(self, started: float) -> bool:
        limit = self.options.exit_duration_in_mins
        return limit is not None and time.monotonic() - started >= 60 * limit

    def _memory(self) -> int:
        if self.session.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _require_finite(self, value: float, what: str = "loss") -> None:
        if not math.isfinite(value):
            raise UsageError(
                f"training iteration {self.progress.iteration}: {what} {value}",
                "it is no longer finite: the learning rate is too high, or the data is broken",
                f"lower --lr (it is {self.options.lr}); the last checkpoint is untouched",
            )

    def _log_differences(self) -> None:
        before = self.progress.options or {}
        now = self.options.decides_results()
        changed = [
            f"{name} was {before[name]} and is {value}"
            for name, value in now.items()
            if before.get(name, value) != value
        ]
        logger.info("resuming after iteration %d", self.progress.iteration)
        if changed:
            logger.warning("other options than before the interruption: %s", "; ".join(changed))
