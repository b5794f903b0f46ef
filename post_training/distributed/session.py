"""The process a stage runs in: versions, device, process groups, seeds, signals, memory, logs.

:func:`open_session` is entered once by every stage after its arguments are checked. CUDA with NCCL
is used where there is a GPU, the CPU with gloo where there is none; nothing else in this repository
asks which.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import logging
import os
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from post_training.common import threads, versions
from post_training.common.errors import UsageError, exit_with_usage_error, first_line
from post_training.common.garbage import uncollected
from post_training.common.quiet import quiet
from post_training.distributed import liveness, logs, placement, signals
from post_training.distributed.parallel import Parallel

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("post_training")


@dataclass
class Session:
    """What a stage knows of the process it runs in.

    ``named_inputs`` are files that its flags name besides models and data, as manifests record
    them.
    """

    stage: str
    parallel: Parallel
    device: torch.device
    rank: int
    world: int
    progress_bars: bool = True
    started: float = field(default_factory=time.time)
    named_inputs: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def show_progress(self) -> bool:
        """Whether this rank draws progress bars."""
        return self.is_main and self.progress_bars and sys.stderr.isatty()

    def peak_memory(self) -> dict[str, int]:
        """Largest peak over all ranks, in bytes: host (resident set) and, on CUDA, device."""
        from post_training.distributed import memory
        from post_training.distributed.collectives import from_all_ranks

        peaks = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if self.device.type == "cuda":
            peaks["device"] = memory.highest_allocated()
        gathered = from_all_ranks(peaks)
        return {name: max(each[name] for each in gathered) for name in peaks}


@contextlib.contextmanager
def open_session(
    stage: str,
    parallel: Parallel,
    *,
    seed: int = 1234,
    timeout_minutes: float = 10,
    log_level: str = "info",
    ignored_flags: Sequence[str] = (),
    notices: Sequence[str] = (),
    progress_bars: bool = True,
) -> Iterator[Session]:
    """Start and end everything a stage runs in. Exits the process on errors that it explains.

    A UsageError ends with code 2, a signal with 128 + its number; any other exception passes.

    Args:
        stage: its name begins each log line.
        parallel: sizes of the parallel groups, for the processes that were started.
        seed: of every random number generator.
        timeout_minutes: limit of a collective operation.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        ignored_flags: given flags without meaning, logged at level debug.
        notices: logged on rank 0, at level info.
        progress_bars: whether rank 0 draws them on a terminal.
    """
    logs.configure(stage, log_level)
    if ignored_flags:
        logger.debug("flags without meaning here: %s", " ".join(ignored_flags))
    for notice in notices:
        logger.info("%s", notice)
    watch = None
    try:
        with signals.prompt_exit(functools.partial(end, stage)) as imported:
            versions.check()
            device = _join(timeout_minutes)
            # Before the imports, which take long enough for a rank to be lost.
            watch = liveness.start(placement.placement())
            current = _start(stage, parallel, device, seed, timeout_minutes)
            current.progress_bars = progress_bars
            imported()
            yield current
    except UsageError as error:
        if watch is not None:
            watch.leave(str(error))
        _stop()
        exit_with_usage_error(error)
    except SystemExit:
        # A stage's own decision, and the same on all ranks. Groups that are left to the
        # interpreter's end may abort it: their threads still run.
        _leave(watch)
        _stop()
        raise
    except Exception as error:
        if watch is not None and watch.follows_a_loss(error):
            signals.exit_now(liveness.EXIT_CODE)
        raise
    _leave(watch)
    _stop()


def end(stage: str, error: signals.Interrupted) -> NoReturn:
    """End the process that a signal interrupted."""
    if placement.placement().rank == 0:
        said = (
            f"\n{stage}: ended by {error}. Finished outputs are untouched; what was "
            "being written is discarded by the next run.\n"
        )
        os.write(2, said.encode())  # a handler may have interrupted a print
    # Process groups may hold ranks that are gone: waiting for them would hang.
    signals.exit_now(error.exit_code)


def _leave(watch: liveness.Watch | None) -> None:
    if watch is not None:
        watch.leave()


def _join(timeout_minutes: float) -> torch.device:
    """Import torch, choose this process's device, and meet the other processes."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signals.end_with_parent()  # torchrun, which may be killed alone
    place = placement.join()
    threads.configure()
    with uncollected():
        import torch

    device = _device()
    # Objects and checkpoints are exchanged on the host, tensors on the device.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = None
    if place.world == 1:  # no port: one that was free a moment ago may be taken by now
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # documented
    try:
        torch.distributed.init_process_group(
            backend,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            store=store,
            rank=place.rank,
            world_size=place.world,
        )
    except RuntimeError as error:
        raise _wrong_interface(error) from error
    return device


def _wrong_interface(error: RuntimeError) -> Exception:
    """A UsageError if a variable names a network interface that gloo cannot use, else ``error``."""
    named = os.environ.get("GLOO_SOCKET_IFNAME")
    if named is None or "address" not in str(error):
        return error
    cause = f"this machine has no such network interface with an address: {first_line(error)}"
    return UsageError(f"GLOO_SOCKET_IFNAME={named}", cause, "unset it, or name one of `ip address`")


def _start(
    stage: str, parallel: Parallel, device: torch.device, seed: int, timeout_minutes: float
) -> Session:
    import torch

    place = placement.placement()
    report = _import_packages()
    _initialize_groups(parallel, timeout_minutes)
    _seed(seed)
    current = Session(stage, parallel, device, place.rank, place.world)
    logger.info("%s", report)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    logger.info(
        "%d process%s on %s: TP=%d PP=%d CP=%d EP=%d",
        place.world,
        "" if place.world == 1 else "es",
        name,
        parallel.tensor,
        parallel.pipeline,
        parallel.context,
        parallel.expert,
    )
    return current


def _import_packages() -> object:
    """Import megatron-core and ModelOpt, stand-ins first, without what they say about each other.

    Both warn at import time that Apex and Transformer Engine are missing (the log says what runs
    instead) and, on a machine without a GPU, that there is none.
    """
    import torch

    from post_training import portable

    missing_gpu = () if torch.cuda.is_available() else ("torch.utils.cpp_extension",)
    with quiet(*missing_gpu, warning=""), uncollected():
        report = portable.install()
        import megatron.core.models.gpt
        import megatron.core.post_training.modelopt.gpt.model_specs  # noqa: F401
        import modelopt.torch.opt.plugins  # noqa: F401
        import transformers  # noqa: F401
    return report


def _device() -> torch.device:
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = placement.placement().local_rank
    if os.environ.get("SLURM_GPUS_PER_TASK") == "1" and torch.cuda.device_count() == 1:
        index = 0  # SLURM shows each task its own GPU only
    if index >= torch.cuda.device_count():
        raise UsageError(
            f"process {index} of this machine",
            f"it has {torch.cuda.device_count()} GPUs, and each process needs its own",
            "lower TP*PP*CP*DP or use more nodes; CUDA_VISIBLE_DEVICES= runs on the CPU",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _initialize_groups(parallel: Parallel, timeout_minutes: float) -> None:
    from megatron.core import parallel_state

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor,
            distributed_timeout_minutes=max(1, round(timeout_minutes)),
        )


def _seed(seed: int) -> None:
    import numpy
    import torch
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def _stop() -> None:
    torch = sys.modules.get("torch")
    if torch is None or not torch.distributed.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
