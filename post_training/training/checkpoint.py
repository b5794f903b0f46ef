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
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import torch_dist
from post_training.common import files, manifest, outputs
from post_training.common.errors import UsageError
from post_training.common.manifest import Manifest
from post_training.distributed import signals

if TYPE_CHECKING:
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.transformer import MegatronModule

logger = logging.getLogger("post_training")

FOLDER = "training"
_OWN = (FOLDER, torch_dist.HUGGINGFACE, torch_dist.TRACKER, manifest.FILE)
_PROGRESS = "training_progress"
_JOB = "slurm_job"  # in the manifest: which job trained last
# Optimizer state in the shapes of the parameters, so that it loads at another layout.
_OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable"}


@dataclass(frozen=True)
class Progress:
    """Where a run stands after an iteration.

    Attributes:
        iteration: steps of the optimizer so far.
        samples: sequences consumed; the data's order goes on from here.
        window: sums of metrics since the last log line, by name.
        options: :meth:`TrainingOptions.decides_results` of the run.
        seconds: time spent training.
    """

    iteration: int = 0
    samples: int = 0
    window: Mapping[str, list[float]] | None = None
    options: Mapping[str, Any] | None = None
    seconds: float = 0.0


def last_iteration(folder: Path) -> int:
    """The newest iteration of a training run in ``folder``; 0 where there is none. No torch."""
    try:
        text = (folder / torch_dist.TRACKER).read_text(encoding="utf-8").strip()
    except OSError:
        return 0
    return int(text) if text.isdecimal() else 0


def goes_on(folder: Path, overwrite: bool) -> bool:
    """Whether there is a run in ``folder`` to go on with. No torch.

    With ``overwrite`` a run is begun anew; but a job that SLURM queued again, with the command line
    that it had, goes on with what it saved itself.
    """
    if not last_iteration(folder):
        return False
    if not overwrite:
        return True
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    return restarts != "0" and (manifest.read(folder) or {}).get(_JOB) == job


def check_folder(
    folder: Path,
    stage: str,
    overwrite: bool = False,
    start: str | None = None,
    model: str | None = None,
) -> None:
    """Raise UsageError unless ``folder`` is free, or holds a run of ``stage`` to go on with.

    Args:
        folder: of the run (``--save``).
        stage: that trains.
        overwrite: whether anything may lie there.
        start: a stage whose output may lie there too, to be trained in its place.
        model: what training would begin with; a run that began with another is not gone on with.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder}", "it is a file", "name a folder")
    # Iterations come and go inside the folder.
    outputs.writable(folder / torch_dist.TRACKER, f"output {folder}")
    if not folder.is_dir() or overwrite:
        return
    if last_iteration(folder):
        content = manifest.read(folder) or {}
        if content.get("stage") != stage:
            raise UsageError(
                f"output folder {folder}",
                f"it holds a training run of {content.get('stage')}, not of {stage}",
                "name another folder in MLM_MODEL_SAVE",
            )
        if model is not None:
            _require_same_start(folder, content, model)
        return
    content = manifest.read(folder) or {}
    if start is not None and content.get("stage") == start:
        return
    foreign = [
        path.name
        for path in sorted(folder.iterdir())
        if path.name not in _OWN and not path.name.startswith(("iter_", "."))
    ]
    if foreign:
        raise UsageError(
            f"output folder {folder}",
            f"it is not empty and holds no training run ({', '.join(foreign[:3])})",
            "delete it, name another in MLM_MODEL_SAVE, or give --overwrite",
        )


def _require_same_start(folder: Path, content: Mapping[str, Any], model: str) -> None:
    """Raise UsageError if ``model`` is not the checkpoint that the run in ``folder`` began with."""
    if Path(model).resolve() == folder.resolve() or not (Path(model) / manifest.FILE).is_file():
        return
    now = manifest.describe_input("model", model)
    for before in content.get("inputs", []):
        # A draft may be trained where convert.sh attached it: that checkpoint is there no more.
        if before["role"] != "model" or Path(before["path"]) == folder.resolve():
            continue
        if before.get("manifest_sha256", now["manifest_sha256"]) != now["manifest_sha256"]:
            raise UsageError(
                f"output folder {folder}",
                f"the training run that it holds began with another model ({before['path']}) than "
                f"{model} is now",
                "name another folder in MLM_MODEL_SAVE, or give --overwrite to train anew",
            )


class TrainingCheckpoints:
    """Saves and restores the iterations of one run; every method is a collective call.

    Args:
        folder: of the run (``--save``).
        record: the manifest for a number of iterations; hashes of the files are added.
        write_huggingface: writes the small files that travel with the checkpoint into a folder.
        keep: iterations to keep; the newest always stays.
    """

    def __init__(
        self,
        folder: Path,
        record: Callable[[int], Manifest],
        write_huggingface: Callable[[Path], None] | None = None,
        keep: int = 2,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self._record = record
        self._write_huggingface = write_huggingface

    def save(
        self, model: MegatronModule, optimizer: MegatronOptimizer, progress: Progress
    ) -> dict[str, Any] | None:
        """Save one iteration. Returns the manifest's content on rank 0."""
        import torch
        from megatron.core import dist_checkpointing
        from modelopt.torch.opt.plugins import save_sharded_modelopt_state

        is_main = torch.distributed.get_rank() == 0
        target = self.folder / f"iter_{progress.iteration:07d}"
        work = files.incomplete(target)
        record = self._record(progress.iteration)
        if "SLURM_JOB_ID" in os.environ:
            record.extra[_JOB] = os.environ["SLURM_JOB_ID"]
        if is_main:
            files.begin(target)
        torch.distributed.barrier()
        tensors = model.sharded_state_dict(metadata=torch_dist.metadata())
        state = {
            "args": torch_dist.megatron_lm_arguments(record.architecture, model),
            "checkpoint_version": torch_dist.CHECKPOINT_VERSION,
            "iteration": progress.iteration,
            "world": _world(),
            _PROGRESS: vars(progress),
            "model": tensors,
            "optimizer": _optimizer_state(
                optimizer, tensors, {**torch_dist.metadata(), **_OPTIMIZER}, progress.iteration
            ),
            "rng_state": _sharded_random_state(),
        }
        with signals.sheltered():
            dist_checkpointing.save(
                state,
                str(work),
                sharded_strategy=torch_dist.save_strategy(model),
                content_metadata=dict(torch_dist.CONTENT),
            )
            if torch_dist.has_modelopt_state(model):
                save_sharded_modelopt_state([model], str(work))
        torch.distributed.barrier()
        content = None
        if is_main:
            self._carry_small_files()
            files.publish(target)
            content = record.write(self.folder, parts=(target.name, torch_dist.HUGGINGFACE))
            files.write_text(self.folder / torch_dist.TRACKER, str(progress.iteration))
            self._remove_old(progress.iteration)
        torch.distributed.barrier()
        return content

    def load(self, model: MegatronModule, optimizer: MegatronOptimizer) -> Progress:
        """Restore optimizer and random states of the newest iteration.

        The weights are in ``model`` already, loaded by ``loading.load`` from the same folder.
        """
        import torch
        from megatron.core import dist_checkpointing

        weights = torch_dist.iteration_folder(self.folder)
        tensors = model.sharded_state_dict(metadata=torch_dist.metadata(weights))
        common = dist_checkpointing.load_common_state_dict(str(weights))
        progress = Progress(**common[_PROGRESS])
        metadata = {**torch_dist.metadata(weights), **_OPTIMIZER}
        wanted: dict[str, Any] = {
            "optimizer": _optimizer_state(
                optimizer, tensors, metadata, progress.iteration, is_loading=True
            )
        }
        layout = common["args"]
        now = (model.config.tensor_model_parallel_size, model.config.pipeline_model_parallel_size)
        before = (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size)
        same_layout = now == before and common["world"] == _world()
        if same_layout:
            wanted["rng_state"] = _sharded_random_state()
        state = dist_checkpointing.load(wanted, str(weights))
        if _trains_something(optimizer):
            _restore_optimizer(optimizer, state["optimizer"])
        if same_layout:
            _set_random_state(state["rng_state"])
        else:
            logger.info("another layout than the saved one: random states begin anew")
        torch.distributed.barrier()
        return progress

    def _carry_small_files(self) -> None:
        target = self.folder / torch_dist.HUGGINGFACE
        if self._write_huggingface is not None and not target.exists():
            self._write_huggingface(files.begin(target))
            files.publish(target)

    def _remove_old(self, newest: int) -> None:
        """Keep the newest iterations; later ones are of a run that this one replaces."""
        numbers = sorted(
            int(path.name.removeprefix("iter_"))
            for path in self.folder.glob("iter_*")
            if path.is_dir() and path.name.removeprefix("iter_").isdecimal()
        )
        kept = [number for number in numbers if number <= newest][-self.keep :]
        for number in set(numbers) - set(kept):
            shutil.rmtree(self.folder / f"iter_{number:07d}")
        for path in self.folder.glob("iter_*.incomplete"):
            shutil.rmtree(path)


def _optimizer_state(
    optimizer: Any,
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any],
    step: int,
    is_loading: bool = False,
) -> Any:
    """The optimizer's sharded state; of a pipeline stage that trains nothing, too.

    megatron-core (distrib_optimizer.py, state_dict) wants a parameter to read the step from. What
    rank 0, which may train nothing, says of the parameter groups is what every rank loads.
    """
    if _trains_something(optimizer):
        if is_loading:
            for each in _parts(optimizer):
                # PyTorch's Adam has no state before its first step, and state_dict wants one.
                if not each.optimizer.state:
                    each._init_optimizer_states_with_dummy_values()
        return optimizer.sharded_state_dict(tensors, is_loading=is_loading, metadata=metadata)
    from megatron.core.optimizer.distrib_optimizer import HAVE_APEX_OR_TE

    groups = [
        {**{name: value for name, value in group.items() if name != "params"}, "step": step}
        for group in _parts(optimizer)[0].optimizer.state_dict()["param_groups"]
    ]
    if not HAVE_APEX_OR_TE:
        groups = [{**group, "step": float(step)} for group in groups]
    return {
        "optimizer": {"param_groups": groups},
        "param_state": {},
        "param_state_sharding_type": _OPTIMIZER["distrib_optim_sharding_type"],
    }


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers that megatron-core chains, of which each wraps one of PyTorch's."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _restore_optimizer(optimizer: Any, state: Any) -> None:
    """Load a state whose tensors have the parameters' shapes.

    megatron-core (distrib_optimizer.py) does not expect PyTorch's Adam there: it looks for each
    parameter's step among the tensors, where it is not, and gives all parameters one step tensor,
    which every parameter then increases. So the tensors are loaded while the steps are numbers, and
    each parameter gets a step of its own.
    """
    import torch

    parts = _parts(optimizer)
    states = [state] if len(parts) == 1 else [state[i] for i in range(len(parts))]
    for each, content in zip(parts, states, strict=True):
        rest = {name: value for name, value in content.items() if name != "param_state"}
        each.load_state_dict(rest)
        counted = [own for own in each.optimizer.state.values() if torch.is_tensor(own.get("step"))]
        for own in counted:
            own["step"] = float(own["step"])
        each.load_parameter_state_from_fully_reshardable(content["param_state"])
        for own in counted:
            own["step"] = torch.tensor(own["step"], dtype=torch.float32)


def _trains_something(optimizer: Any) -> bool:
    return any(group["params"] for group in optimizer.param_groups)


def _world() -> int:
    import torch

    return torch.distributed.get_world_size()


def _sharded_random_state() -> Any:
    """This rank's random states, as one object of its place among all ranks."""
    import numpy
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedObject
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    state = {
        "random": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "tracker": get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    rank = torch.distributed.get_rank()
    return ShardedObject("rng_state", state, (_world(),), (rank,), replica_id=0)


def _set_random_state(state: Mapping[str, Any]) -> None:
    import numpy
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["random"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_cuda_rng_tracker().set_states(state["tracker"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
