"""Threads follow the cores that a process may use: its affinity and its container's CPU quota."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tools

from post_training.common import threads

PROGRAM = """
import os, sys
from post_training.common import threads
if len(sys.argv) > 1:
    open(sys.argv[1], "w").write(str(os.getpid()))  # from here on a member of that cgroup
threads.configure()
import torch
print(threads.cores(), torch.get_num_threads(), os.environ.get("GOMP_SPINCOUNT"))
"""
GROUPS = Path("/sys/fs/cgroup/cpu")  # version 1


def threads_of(*words: str, prefix: tuple[str, ...] = (), **variables: str) -> str:
    ours = ("OMP_", "GOMP_")
    environment = {name: each for name, each in os.environ.items() if not name.startswith(ours)}
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PROGRAM, *words],
        cwd=tools.ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Writes this process's cgroups and their files, by path below /sys/fs/cgroup."""

    def write(cgroup: str, **quotas: str) -> None:
        (tmp_path / "cgroup").write_text(cgroup)
        for name, text in quotas.items():
            path = tmp_path / "mount" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    monkeypatch.setattr(threads, "_SELF", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_MOUNT", tmp_path / "mount")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    return write


def test_a_process_bound_to_one_core_has_one_thread():
    assert threads_of(prefix=("taskset", "-c", "0")) == "1 1 10000"


def test_what_the_user_sets_wins():
    given = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"}
    assert threads_of(prefix=("taskset", "-c", "0"), **given) == "1 2 None"


@pytest.mark.skipif(
    not os.access(GROUPS / "cgroup.procs", os.W_OK) or len(os.sched_getaffinity(0)) < 2,
    reason="NOT TESTED: needs two cores and the right to make cgroups (version 1)",
)
def test_a_quota_of_one_core_gives_one_thread():
    group = GROUPS / f"threads{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpu.cfs_quota_us").write_text("150000")
        assert threads_of(str(group / "cgroup.procs")) == "1 1 10000"
    finally:
        group.rmdir()


@pytest.mark.parametrize(
    ("cgroup", "quotas", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        # The group above allows less than the process's own.
        ("0::/a/b\n", {"a/b/cpu.max": "600000 100000", "a/cpu.max": "300000 100000"}, 3),
        # Version 1; in a container the path is the host's, and its files are at the top.
        ("5:memory:/x\n4:cpu,cpuacct:/docker/1\n0::/\n",
         {"cpu,cpuacct/cpu.cfs_quota_us": "400000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpuset:/\n", {"cpu.max": "100000 100000"}, 8),
        ("", {}, 8),
    ],
)  # fmt: skip
def test_quotas_are_read_as_both_versions_of_cgroups_write_them(cgroup, quotas, cores, groups):
    groups(cgroup, **quotas)
    assert threads.cores() == cores
