"""Memory that is free, and peaks of use: on the GPU, or of the host where there is none."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_MEMORY = Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
# Of a container: the limit and what is used of it, in cgroups of version 2 and 1.
_OF_GROUP = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)
# What PyTorch's allocator of host memory says, and cuBLAS; they have no exception of their own.
_NO_MEMORY = ("can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")

_highest = 0  # allocated on the GPU before the peak was last reset


@dataclass
class Peak:
    """Bytes that a block allocated on the GPU at most, beyond what was allocated before it."""

    bytes: int = 0


@contextlib.contextmanager
def measuring(device: torch.device) -> Iterator[Peak]:
    """Measure the block's peak; 0 on the CPU, where nothing counts it."""
    global _highest
    peak = Peak()
    if device.type != "cuda":
        yield peak
        return
    _highest = highest_allocated()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak.bytes = torch.cuda.max_memory_allocated(device) - before


def highest_allocated() -> int:
    """Bytes that this process's GPU had allocated at most, since the start."""
    return max(_highest, torch.cuda.max_memory_allocated())


def free(device: torch.device) -> int:
    """Bytes that new tensors may take: of the GPU, or this process's share of the host's."""
    if device.type == "cuda":
        allocated = torch.cuda.memory_allocated(device)
        left, total = torch.cuda.mem_get_info(device)
        # What this process may take of it, if it was limited.
        share = torch.cuda.get_per_process_memory_fraction(device)
        cached = torch.cuda.memory_reserved(device) - allocated
        return min(int(left) + cached, int(share * total) - allocated)
    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    return min([_available(), *_left_to_group()]) // processes


def is_exhausted(error: BaseException) -> bool:
    """Whether an error says that there was no memory left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _NO_MEMORY)


def _available() -> int:
    """Bytes of host memory that can be had without swapping."""
    for line in _MEMORY.read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


def _left_to_group() -> Iterator[int]:
    """Bytes that a container's limit leaves; a number for each limit that there is."""
    for limit, used in _OF_GROUP:
        try:
            most = (_GROUPS / limit).read_text(encoding="ascii").strip()
            if most != "max":
                yield int(most) - int((_GROUPS / used).read_text(encoding="ascii"))
        except OSError:
            continue
