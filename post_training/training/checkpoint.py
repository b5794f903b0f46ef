"""Checkpoints of a training run: each iteration whole, the newest named by the tracker file.

Layout, Megatron-LM's with a manifest::

    run.json                              describes the newest iteration
    latest_checkpointed_iteration.txt     its number
    iter_0001000/                         weights, ModelOpt state, optimizer, random states
    huggingface/                          configuration and tokenizer of the source
    training/                             metrics.jsonl, curves.png, TensorBoard files, ...

Other stages load the folder as any checkpoint. Order of a save: the iteration under another name,
rename, manifest, tracker, then old iterations go. Whatever moment a process is killed at, the
tracker names an iteration that is whole, and the manifest one that is there.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import megatron_arguments, sharding, torch_dist
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.unpickling import only_known_classes
from post_training.common import files
from post_training.common.manifest import Manifest
from post_training.training import state as training_state
from post_training.training.run_folder import JOB

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer import MegatronModule

logger = logging.getLogger("post_training")

_PROGRESS = "training_progress"


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an iteration.

    Attributes:
        iteration: steps of the optimizer so far.
        samples: sequences consumed; the position in the data's order.
        window: sums of metrics since the last log line, by name.
        options: :meth:`TrainingOptions.decides_results` of the run.
        seconds: time spent training.
    """

    iteration: int = 0
    samples: int = 0
    window: Mapping[str, list[float]] | None = None
    options: Mapping[str, Any] | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class TrainingCheckpoints:
    """Saves and restores the iterations of one run; every method is a collective call.

    Attributes:
        folder: of the run (``--save``).
        record: the manifest for a number of iterations and the metrics known then; hashes of the
            files are added.
        small_files: configuration and tokenizer that travel with the checkpoint.
        keep: iterations to keep; the newest always stays.
    """

    folder: Path
    record: Callable[[int, Mapping[str, float]], Manifest]
    small_files: SmallFiles
    keep: int

    def save(
        self,
        model: MegatronModule,
        optimizer: MegatronOptimizer,
        progress: Progress,
        metrics: Mapping[str, float],
    ) -> dict[str, Any]:
        """Save one iteration. Returns the manifest's content."""
        import torch

        from post_training.checkpoints import extra_tensors
        from post_training.distributed import collectives

        target = self.folder / f"iter_{progress.iteration:07d}"
        record = self.record(progress.iteration, metrics)
        if "SLURM_JOB_ID" in os.environ:
            record.extra[JOB] = os.environ["SLURM_JOB_ID"]
        work = collectives.on_first_rank(lambda: files.begin(target))
        tensors = sharding.sharded(model)
        state = {
            "args": megatron_arguments.megatron_lm_arguments(record.architecture, model),
            "checkpoint_version": torch_dist.CHECKPOINT_VERSION,
            "iteration": progress.iteration,
            "world": torch.distributed.get_world_size(),
            _PROGRESS: vars(progress),
            "model": tensors,
            "optimizer": training_state.optimizer_state(
                optimizer, tensors, sharding.metadata(), progress.iteration
            ),
            "rng_state": training_state.sharded_random_state(),
        }
        torch_dist.write(state, work, model)

        def finish() -> dict[str, Any]:
            small_files = self.folder / torch_dist.HUGGINGFACE
            if not small_files.exists():
                work_of_small = files.begin(small_files)
                self.small_files.copy_to(work_of_small)
                extra_tensors.carry(self.small_files.folder, work_of_small)
                files.publish(small_files)
            files.publish(target)
            content = record.write(self.folder, parts=(target.name, torch_dist.HUGGINGFACE))
            files.write_text(self.folder / torch_dist.TRACKER, str(progress.iteration))
            files.drop_previous(self.folder)
            self._remove_old(progress.iteration)
            return content

        return collectives.on_first_rank(finish)

    def load(self, model: MegatronModule, optimizer: MegatronOptimizer) -> Progress:
        """Restore optimizer and random states of the newest iteration.

        The weights are in ``model`` already, loaded by ``loading.load`` from the same folder.
        """
        import torch
        from megatron.core import dist_checkpointing

        weights = torch_dist.iteration_folder(self.folder)
        tensors = sharding.sharded(model, weights)
        with only_known_classes(f"checkpoint {weights}"):
            common = dist_checkpointing.load_common_state_dict(str(weights))
        progress = Progress(**common[_PROGRESS])
        wanted: dict[str, Any] = {
            "optimizer": training_state.optimizer_state(
                optimizer,
                tensors,
                sharding.metadata(weights),
                progress.iteration,
                is_loading=True,
            )
        }
        layout = common["args"]
        now = (model.config.tensor_model_parallel_size, model.config.pipeline_model_parallel_size)
        before = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
        same_layout = now == before and common["world"] == torch.distributed.get_world_size()
        if same_layout:
            wanted["rng_state"] = training_state.sharded_random_state()
        with only_known_classes(f"checkpoint {weights}"):
            state = dist_checkpointing.load(wanted, str(weights))
        training_state.restore_optimizer(optimizer, state["optimizer"])
        if same_layout:
            training_state.set_random_state(state["rng_state"])
        else:
            logger.info("another layout than the saved one: random states start from the seed")
        torch.distributed.barrier()
        return progress

    def _remove_old(self, newest: int) -> None:
        """Keep the newest iterations; later ones are of a run that this one replaces."""
        saved = {
            int(path.name.removeprefix("iter_")): path
            for path in self.folder.glob("iter_*")
            if path.is_dir() and path.name.removeprefix("iter_").isdecimal()
        }
        kept = sorted(number for number in saved if number <= newest)[-self.keep :]
        for number in saved.keys() - set(kept):
            shutil.rmtree(saved[number])
        for path in self.folder.glob("iter_*.incomplete"):
            shutil.rmtree(path)
