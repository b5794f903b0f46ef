"""How many threads this process may use, and how they wait. No torch.

torch's OpenMP runtime (libgomp) knows the cores that a process is bound to, but not the quota of a
container (``docker run --cpus=1``), and its threads spin for milliseconds while they wait for each
other: on cores that others use too, the one that is waited for does not get to run.
:func:`configure` fixes both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_SELF = Path("/proc/self/cgroup")
_MOUNT = Path("/sys/fs/cgroup")
# Turns of libgomp's waiting loop before a thread sleeps (its own default is 300,000). Measured in
# benchmarks/README.md: as fast as the default on idle cores, three times as fast on shared ones.
_SPIN_COUNT = "10000"


def cores() -> int:
    """Cores that this process may use: its affinity, and at most its cgroups' CPU quota."""
    bound = len(os.sched_getaffinity(0))
    return max(1, min([bound, *map(int, _quotas())]))


def configure() -> None:
    """Set OpenMP's variables, unless the user has; call before torch is imported.

    How threads wait changes no result. The number of threads changes the order of
    sums, so it is only set where OpenMP would take more threads than there are cores.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPIN_COUNT)
    if cores() < len(os.sched_getaffinity(0)):
        os.environ.setdefault("OMP_NUM_THREADS", str(cores()))


def _quotas() -> Iterator[float]:
    """CPU quotas, in cores, of this process's cgroups (v1 and v2) and of the groups above them."""
    try:
        lines = _SELF.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = _MOUNT / controllers if controllers else _MOUNT
        # In a container the path may be the host's, of which only the top is there.
        for folder in (mount / path.lstrip("/"), *(mount / path.lstrip("/")).parents):
            yield from _quota(folder)
            if folder == mount:
                break


def _quota(folder: Path) -> Iterator[float]:
    """The quota of one group, in cores, if it has one."""
    for names in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            words = " ".join((folder / name).read_text(encoding="utf-8") for name in names).split()
        except OSError:
            continue
        if words[0] not in ("max", "-1"):
            yield int(words[0]) / int(words[1])
