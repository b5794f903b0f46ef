"""Where a process stands among the others: torchrun's variables, SLURM's, or neither."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import tools

from post_training.common.errors import UsageError
from post_training.distributed import placement

STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "localhost,other[1-4]",
}


@pytest.fixture
def variables(monkeypatch):
    """Sets the process's variables to these and nothing of torchrun's or SLURM's besides."""

    def put(**values: str) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM", "MASTER_")) or name in ("RANK", "WORLD_SIZE"):
                monkeypatch.delenv(name)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    before = dict(os.environ)
    put()
    yield put
    # What the code under test set must not reach other tests.
    os.environ.clear()
    os.environ.update(before)


def test_torchruns_variables_win(variables):
    variables(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", **STEP)
    assert placement.placement() == placement.Placement(5, 8, 1)


def test_a_rank_without_a_world_size_is_pyxis_and_slurm_says_the_rest(variables):
    """pyxis's source: for an image with PYTORCH_VERSION, RANK is SLURM_PROCID in every task."""
    variables(RANK="3", LOCAL_RANK="1", **STEP)
    assert placement.placement() == placement.Placement(3, 4, 1)
    variables(RANK="0", LOCAL_RANK="0", **{**STEP, "SLURM_STEP_NUM_TASKS": "1"})
    assert placement.placement() == placement.Placement(0, 1, 0)


def test_a_task_of_a_slurm_step_is_a_rank(variables):
    variables(**STEP)
    assert placement.placement() == placement.Placement(3, 4, 1)
    placement.join()
    found = [os.environ[n] for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")]
    assert found == ["3", "4", "1", "localhost"]
    assert 12000 <= int(os.environ["MASTER_PORT"]) < 30000


def test_a_batch_script_and_a_single_task_are_alone(variables):
    """A batch script has SLURM_PROCID and the job's SLURM_NTASKS, but is no step."""
    variables(SLURM_JOB_ID="1", SLURM_PROCID="0", SLURM_NTASKS="8", SLURM_LOCALID="0")
    assert placement.placement() == placement.Placement()
    variables(**{**STEP, "SLURM_STEP_NUM_TASKS": "1"})
    assert placement.placement() == placement.Placement()
    placement.join()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_two_jobs_and_two_steps_of_a_job_meet_at_different_ports(variables):
    ports = set()
    for job, step in [("1234", "2"), ("1234", "3"), ("1235", "2")]:
        variables(**{**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        ports.add(placement.rendezvous()[1])
    assert len(ports) == 3


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node7", "node1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("r[1-2]n[03,05]", "r1n03"),
        ("a-b[10]-ib.example.org,c", "a-b10-ib.example.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert placement.first_host(nodes) == first


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": ""}])
def test_without_an_address_the_message_says_what_to_set(variables, given):
    variables(**{**STEP, "SLURM_STEP_NODELIST": "no-such-host.invalid[1-2]"}, **given)
    with pytest.raises(UsageError) as refused:
        placement.join()
    assert "MASTER_ADDR" in refused.value.what
    assert "no-such-host.invalid[1-2]" in refused.value.cause
    assert "set MASTER_ADDR" in refused.value.remedy
    variables(RANK="0", WORLD_SIZE="2", **given)
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        placement.join()


def test_a_number_that_is_none_is_named(variables):
    variables(RANK="one", WORLD_SIZE="2")
    with pytest.raises(UsageError, match="RANK=one"):
        placement.placement()


def test_launchers_get_address_and_port(variables):
    variables(**STEP)
    done = subprocess.run(
        [sys.executable, "-m", "post_training.placement"],
        cwd=tools.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"localhost {12000 + 12342}\n"
