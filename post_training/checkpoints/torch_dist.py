"""Megatron-LM checkpoints (``torch_dist``) of a model and its ModelOpt state.

Layout of a checkpoint folder::

    run.json                              manifest
    latest_checkpointed_iteration.txt     "release", or an iteration number
    release/  or  iter_0000100/           torch_dist files, modelopt_state/
    huggingface/                          config.json, tokenizer, generation config of the source

The folder is written under another name and renamed, so a killed save leaves the previous
checkpoint intact. Keys are those of the Transformer Engine layer spec, as Megatron-LM writes them.
A checkpoint can be loaded at other tensor- and pipeline-parallel sizes than it was saved at.
"""

from __future__ import annotations

import queue
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from post_training.checkpoints import finite, sharding
from post_training.checkpoints.huggingface import SmallFiles
from post_training.checkpoints.megatron_arguments import megatron_lm_arguments
from post_training.checkpoints.unpickling import only_known_classes
from post_training.common import files, regular, threads
from post_training.common.errors import UsageError
from post_training.common.manifest import Manifest
from post_training.distributed import signals

if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule


TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
HUGGINGFACE = "huggingface"
MODELOPT_STATE = "modelopt_state"
CHECKPOINT_VERSION = 3.0
# Bytes of a rank's weights for each file that it writes, and the most files.
_FILE_BYTES = 1 << 30
_MOST_FILES = 8
# Names under which an iteration of training keeps its own state (training/checkpoint.py).
TRAINING_KEYS = ("optimizer.", "rng_state", "_loss_modules.")


def iteration_folder(folder: Path, what: str = "") -> Path:
    """The folder with the weights: ``folder`` itself, or what its tracker file names.

    Raises a UsageError about ``what``, by default the checkpoint, if there is none.
    """
    what = what or f"checkpoint {folder}"
    files.recover(folder)
    if (folder / "metadata.json").is_file():
        return folder
    if not (folder / TRACKER).is_file():
        remedy = "name the folder that a stage saved, or one of its iterations"
        if (folder / "config.json").is_file():
            remedy = "it is a Hugging Face folder: name it in HF_MODEL_CKPT, or convert it first"
        raise UsageError(what, f"it has neither {TRACKER} nor metadata.json", remedy)
    try:
        text = regular.read_text(folder / TRACKER).strip()
    except ValueError:
        text = ""  # no UTF-8, or too large
    if text != RELEASE and not text.isdecimal():
        raise UsageError(
            f"{what}: {TRACKER} says {text[:40]!r}",
            "neither 'release' nor an iteration number",
            "write the name of an iteration that is there into it",
        )
    name = text if text == RELEASE else f"iter_{int(text):07d}"
    if not (folder / name / "metadata.json").is_file():
        raise UsageError(
            what,
            f"its {TRACKER} says {text}, but {name}/metadata.json is missing",
            "the copy is incomplete: copy or make it again",
        )
    return folder / name


def save(
    model: MegatronModule,
    folder: Path,
    manifest: Manifest,
    *,
    small_files: SmallFiles | None = None,
) -> dict[str, Any]:
    """Save ``model`` and its ModelOpt state to ``folder``, atomically; a collective call.

    A previous checkpoint is replaced only when this one is whole. ``manifest`` is completed and
    written as ``run.json``. Returns its content.
    """
    from post_training.checkpoints import extra_tensors
    from post_training.distributed import collectives

    def begin() -> Path:
        work = files.begin(folder)
        (work / RELEASE).mkdir()
        return work

    work = collectives.on_first_rank(begin)
    state = {
        "args": megatron_lm_arguments(manifest.architecture, model),
        "checkpoint_version": CHECKPOINT_VERSION,
        "iteration": 0,
        "model": sharding.sharded(model),
    }
    write(state, work / RELEASE, model)

    def finish() -> dict[str, Any]:
        if small_files is not None:
            (work / HUGGINGFACE).mkdir()
            small_files.copy_to(work / HUGGINGFACE)
            extra_tensors.carry(small_files.weights or small_files.folder, work / HUGGINGFACE)
        files.write_text(work / TRACKER, RELEASE)
        content = manifest.write(work)
        files.publish(folder)
        return content

    return collectives.on_first_rank(finish)


def write(state: dict[str, Any], weights: Path, model: MegatronModule) -> None:
    """Write a sharded state dict, and the ModelOpt state of ``model``; a collective call.

    Args:
        state: what megatron-core's ``dist_checkpointing.save`` takes.
        weights: an empty folder.
        model: this rank's part. A large one is written to several files, each written, and later
            hashed, by a thread of its own.
    """
    import torch
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
    from modelopt.torch.opt.plugins import save_sharded_modelopt_state
    from torch.distributed.checkpoint.api import CheckpointException

    # Threads of this process answer through it. megatron-core's own, made for a writer in another
    # process, is a process that imports everything again and outlives a killed parent.
    filesystem_async._results_queue = queue.Queue()
    size = sum(tensor.numel() * tensor.element_size() for tensor in model.parameters())
    strategy = TorchDistSaveShardedStrategy(
        thread_count=max(1, min(_MOST_FILES, size // _FILE_BYTES, threads.cores()))
    )
    try:
        with signals.unwrapped():
            dist_checkpointing.save(
                *(state, str(weights), strategy), content_metadata=dict(sharding.CONTENT)
            )
    except CheckpointException as error:  # a BaseException, which no handler of errors sees
        first = next((failure for failure, _ in error.failures.values()), error)
        raise RuntimeError(f"{weights} could not be written: {first}") from error
    if has_modelopt_state(model):
        save_sharded_modelopt_state([model], str(weights))
    torch.distributed.barrier()


def load(model: MegatronModule, folder: Path, *, only: str = "") -> None:
    """Load weights, ModelOpt state first, into ``model`` (changed in place); a collective call.

    Args:
        folder: a checkpoint folder, or one of its iterations.
        only: load this module alone, into a model that has it already (on a pipeline stage at
            least); its ModelOpt state stays.

    Raises:
        UsageError: if the checkpoint's tensors are not the model's (missing and unexpected names
            and differing shapes are named), or hold values that are not finite.
    """
    import torch
    from modelopt.torch.opt.plugins import restore_sharded_modelopt_state

    weights = iteration_folder(folder)
    if (weights / MODELOPT_STATE).is_dir() and not only:
        # Restoring sizes the scales by calibrating the weights, which must not be NaN by chance.
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(1)
        with only_known_classes(f"checkpoint {folder}"):
            restore_sharded_modelopt_state([model], str(weights))
        sharding.keep_dtypes(model, weights)
    tensors = sharding.sharded(model, weights, only=only)
    state, lacking, more = read(tensors, folder)
    lacking, more = of_model(lacking, only), of_model(more, only)
    if lacking or more:
        raise differs(folder, lacking, more)
    # A pipeline stage may have none of the tensors that ``only`` names.
    model.load_state_dict(state, strict=False)
    finite.check_model(model, f"checkpoint {folder}")


def read(
    tensors: dict[str, Any], folder: Path, *, whole: bool = True
) -> tuple[dict[str, Any], list[str], list[str]]:
    """The values of a model's sharded tensors; names that the checkpoint lacks; others it has.

    Args:
        whole: every rank's tensors together are all layers'.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        with only_known_classes(f"checkpoint {folder}"):
            state, more, lacking = dist_checkpointing.load(
                {"model": tensors},
                str(iteration_folder(folder)),
                strict=StrictHandling.RETURN_ALL,
                validate_access_integrity=whole,
            )
    except (dist_checkpointing.core.CheckpointingException, CheckpointException) as error:
        # Of several ranks' failures the last line says what is wrong.
        reason = str(error).strip().splitlines()[-1]
        raise UsageError(
            f"checkpoint {folder}",
            f"it does not fit this model: {reason}",
            "use the conf of the model that was saved; packed integers (--compress) need its TP",
        ) from error
    # What megatron-core calls missing is missing in what was asked for.
    return state.get("model", {}), sorted(lacking), sorted(more)


def differs(folder: Path, lacking: list[str], more: list[str]) -> UsageError:
    """The error to raise for a checkpoint with other tensors than the model's."""
    return UsageError(
        f"checkpoint {folder}",
        f"it lacks {_examples(lacking)} and has {_examples(more)} that the model lacks",
        "use the conf of the model that was saved",
    )


def has_modelopt_state(model: MegatronModule) -> bool:
    """Whether a loader must repeat ModelOpt's changes: quantizers and drafts, not a teacher."""
    import modelopt.torch.opt as mto

    converted = mto.ModeloptStateManager.is_converted(model)
    return converted and bool(mto.modelopt_state(model)["modelopt_state_dict"])


def holds(folder: Path, name: str) -> bool:
    """Whether a tensor's name contains ``name``; no torch, as pickled names are stored as text."""
    try:
        return name.encode() in (iteration_folder(folder) / ".metadata").read_bytes()
    except FileNotFoundError:
        return False


def is_quantized(folder: Path) -> bool:
    """Whether the checkpoint holds a ModelOpt state (quantized, pruned or drafted)."""
    return (iteration_folder(folder) / MODELOPT_STATE).is_dir()


def uses_transformer_engine_keys(folder: Path) -> bool:
    """Whether norms are named as in the fused spec; Megatron-LM's other specs name them apart."""
    unfused = (".input_layernorm.weight", ".pre_mlp_layernorm.weight")
    names = sharding.stored(iteration_folder(folder))
    return not any(name.endswith(unfused) and "experts" not in name for name in names)


def of_model(names: Iterable[str], only: str) -> list[str]:
    """Names of tensors of the model, or of its module ``only``: not of training's own state."""
    own = (name for name in names if name.startswith(f"{only}." if only else ""))
    return sorted(
        n for n in own if not n.startswith(TRAINING_KEYS) and not n.endswith("_extra_state")
    )


def _examples(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) or "nothing") + more
