"""Which process this is, of how many, on which machine: as torchrun or SLURM says.

torchrun sets ``RANK``, ``WORLD_SIZE`` and ``LOCAL_RANK``. A SLURM step of one task per process
(``srun --ntasks=N``, with ``LAUNCH_SCRIPT=python``) has ``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS``
and ``SLURM_LOCALID`` instead. A process with neither is alone.

    python -m post_training.placement     address and port of the first node, for torchrun

SLURM's host lists (``gpu[07-09,12],login``) are expanded by its own ``scontrol show hostnames``. A
job of slurm/job.sh needs none of that here: its batch script sets ``MASTER_ADDR``, also for
containers, which have no ``scontrol``. Nothing here imports torch.
"""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from post_training.common import files
from post_training.common.errors import UsageError

_FIRST_PORT, _PORTS = 12000, 18000  # below the range from which systems give out ports


@dataclass(frozen=True)
class Placement:
    """A process among those of a stage; ``local_rank`` counts on one machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0


def placement() -> Placement:
    """This process's rank among those of the stage.

    Raises:
        UsageError: if a variable of torchrun's or SLURM's is not an integer, or no rank.
    """
    # pyxis sets RANK and LOCAL_RANK for images with PyTorch, without WORLD_SIZE.
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        found = Placement(_whole("RANK"), _whole("WORLD_SIZE"), _whole("LOCAL_RANK"))
        if not 0 <= found.rank < found.world or found.local_rank < 0:
            raise UsageError(
                f"RANK={found.rank} WORLD_SIZE={found.world} LOCAL_RANK={found.local_rank}",
                "ranks count from 0 to WORLD_SIZE - 1",
                "unset them, or let torchrun or srun set them",
            )
        return found
    if in_step_of_tasks():
        return Placement(
            _whole("SLURM_PROCID"), _whole("SLURM_STEP_NUM_TASKS", 1), _whole("SLURM_LOCALID")
        )
    return Placement()


def in_step_of_tasks() -> bool:
    """Whether SLURM started this process as one task of several.

    ``SLURM_PROCID`` alone does not say so: a batch script has it too.
    """
    return "SLURM_STEP_ID" in os.environ and _whole("SLURM_STEP_NUM_TASKS", 1) > 1


def host() -> str:
    """This machine's name: SLURM's for the node, where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def join() -> Placement:
    """Set torchrun's variables for this process where they are missing; returns its place.

    A process alone needs no address and takes no port: see ``session._join``.

    Raises:
        UsageError: if the first process's address is not known.
    """
    found = placement()
    os.environ.update(
        RANK=str(found.rank), WORLD_SIZE=str(found.world), LOCAL_RANK=str(found.local_rank)
    )
    if found.world > 1:
        address, port = rendezvous()
        os.environ.update(MASTER_ADDR=address, MASTER_PORT=str(port))
    return found


def rendezvous() -> tuple[str, int]:
    """Address and port at which the processes of several tasks or nodes meet.

    ``MASTER_ADDR`` and ``MASTER_PORT``, else the first node of the SLURM step and a port that
    follows from the job and the step, so that two jobs on a node do not meet.

    Raises:
        UsageError: if neither gives an address.
    """
    step = _whole("SLURM_JOB_ID") * 10 + _whole("SLURM_STEP_ID") % 10
    port = _whole("MASTER_PORT", _FIRST_PORT + step % _PORTS)
    address = os.environ.get("MASTER_ADDR") or first_address()
    if not address:
        raise UsageError(
            f"MASTER_ADDR{'= (empty)' if 'MASTER_ADDR' in os.environ else ' (not set)'}",
            "the processes need the address of the first one's machine to meet, and the node list "
            f"{os.environ.get('SLURM_STEP_NODELIST', '(none)')} gives none that this machine knows",
            "set MASTER_ADDR to the first node's name or address, the same on every node",
        )
    return address, port


def first_address() -> str | None:
    """Name of the step's first node if it resolves, else the address that SLURM has for it.

    Raises:
        UsageError: if ``scontrol``, which expands the host list, cannot be asked.
    """
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return None
    is_list = "," in nodes or "[" in nodes
    name = _scontrol("hostnames", nodes).split()[0] if is_list else nodes
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        found = re.search(r"\bNodeAddr=(\S+)", _scontrol("node", name))
        return found[1] if found else None
    return name


def _scontrol(what: str, which: str) -> str:
    """Output of ``scontrol --oneliner show WHAT WHICH``."""
    line = ["scontrol", "--oneliner", "show", what, which]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=20)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout
        said = done.stderr.strip()
    except (OSError, subprocess.SubprocessError) as error:
        said = str(error)
    raise UsageError(
        f"MASTER_ADDR (not set) and scontrol show {what} {which}",
        f"SLURM cannot be asked where the first process runs: {said}",
        "set MASTER_ADDR to the first node's name or address, the same on every node, or put "
        "scontrol on the PATH (containers rarely have it)",
    )


def note_saved(iteration: int) -> None:
    """Record for the SLURM job's batch script that something was saved in this start of the job.

    slurm/job.sh, which sets ``MLM_STATE_FILE``, requeues a job a few times at most with nothing
    saved. A run that cannot write the file is as good as any other.
    """
    path = os.environ.get("MLM_STATE_FILE")
    if not path:
        return
    restart = os.environ.get("SLURM_RESTART_COUNT", "0")
    try:
        files.write_text(Path(path), f"iteration={iteration}\nrestart={restart}\n")
    except OSError as error:
        print(f"warning: {path} cannot be written: {error}", file=sys.stderr)


def _whole(name: str, default: int = 0) -> int:
    text = os.environ.get(name, "")
    try:
        return int(text or default)
    except ValueError:
        raise UsageError(
            f"environment variable {name}={text}",
            "it is not an integer",
            "unset it, or let torchrun or srun set it",
        ) from None
