"""Where a process stands among the others: torchrun's variables, SLURM's, or neither."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys

import pytest
import tools

from post_training.common.errors import UsageError
from post_training.distributed import placement, session

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "localhost",
}


@pytest.fixture
def variables():
    """Sets the process's variables to these and nothing of torchrun's or SLURM's besides."""

    def put(**values: str) -> None:
        for name in list(os.environ):
            if name.startswith(("SLURM", "MASTER_", "MLM_")) or name in TORCHRUN:
                del os.environ[name]
        os.environ.update(values)

    put()
    return put


def test_torchruns_variables_win(variables):
    variables(RANK="5", WORLD_SIZE="8", LOCAL_RANK="1", **STEP)
    assert placement.placement() == placement.Placement(5, 8, 1)


@pytest.mark.parametrize("rank", ["8", "-1"])
def test_a_rank_is_one_of_the_world(variables, rank):
    variables(RANK=rank, WORLD_SIZE="8", LOCAL_RANK="0")
    with pytest.raises(UsageError, match=f"RANK={rank} WORLD_SIZE=8"):
        placement.placement()


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
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("0", "1")
    assert not {"MASTER_ADDR", "MASTER_PORT"} & set(os.environ)


def test_a_process_alone_needs_no_port():
    """Two jobs on a machine: the port that one found free was taken by the other's connection."""
    program = (
        "from post_training.distributed.parallel import Parallel\n"
        "from post_training.distributed.session import open_session\n"
        "from post_training.distributed.collectives import from_all_ranks\n"
        "with open_session('test', Parallel()) as session:\n"
        "    print(from_all_ranks(session.rank))\n"
    )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-c", program],
            cwd=tools.ROOT,
            env=tools.environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
            capture_output=True,
            text=True,
        )
    assert done.stdout == "[0]\n", done.stderr


def test_two_jobs_and_two_steps_of_a_job_meet_at_different_ports(variables):
    ports = set()
    for job, step in [("1234", "2"), ("1234", "3"), ("1235", "2")]:
        variables(**{**STEP, "SLURM_JOB_ID": job, "SLURM_STEP_ID": step})
        ports.add(placement.rendezvous()[1])
    assert len(ports) == 3


@pytest.mark.skipif(not shutil.which("scontrol"), reason="NOT TESTED: needs SLURM's scontrol")
@pytest.mark.parametrize(
    ("nodes", "first"),
    [("localhost,other[1-4]", "localhost"), ("127.0.0.[02-05,9],x", "127.0.0.02")],
)
def test_a_host_list_is_expanded_by_slurm(nodes, first, variables, tmp_path):
    conf = tmp_path / "slurm.conf"
    conf.write_text("ClusterName=test\nSlurmctldHost=localhost\nNodeName=localhost\n")
    variables(**{**STEP, "SLURM_STEP_NODELIST": nodes}, SLURM_CONF=str(conf))
    assert placement.first_address() == first
    variables(**{**STEP, "SLURM_STEP_NODELIST": "other[1-"}, SLURM_CONF=str(conf))
    with pytest.raises(UsageError, match="scontrol show"):
        placement.first_address()


def test_a_host_list_without_scontrol_is_refused_with_what_to_set(variables, monkeypatch):
    variables(**{**STEP, "SLURM_STEP_NODELIST": "gpu[07-09,12],login"})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError) as refused:
        placement.join()
    assert "scontrol show hostnames gpu[07-09,12],login" in refused.value.what
    assert "scontrol" in refused.value.cause
    assert "set MASTER_ADDR" in refused.value.remedy
    monkeypatch.setenv("MASTER_ADDR", "gpu07")
    assert placement.rendezvous()[0] == "gpu07"


def test_a_save_is_recorded_with_the_start_of_the_job_it_happened_in(variables, tmp_path):
    placement.note_saved(3)  # in no job: nothing to record
    file = tmp_path / "7.state"
    variables(MLM_STATE_FILE=str(file))
    placement.note_saved(4)
    assert file.read_text() == "iteration=4\nrestart=0\n"
    variables(MLM_STATE_FILE=str(file), SLURM_RESTART_COUNT="2")
    placement.note_saved(8)
    assert file.read_text() == "iteration=8\nrestart=2\n"


def test_a_state_file_that_cannot_be_written_does_not_end_the_training(variables, capsys):
    variables(MLM_STATE_FILE="/no such folder/7.state")
    placement.note_saved(4)
    assert "warning: /no such folder/7.state" in capsys.readouterr().err


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": ""}])
def test_without_an_address_the_message_says_what_to_set(variables, given):
    variables(**{**STEP, "SLURM_STEP_NODELIST": "no-such-host.invalid[1-2]"}, **given)
    with pytest.raises(UsageError) as refused:
        placement.join()
    assert "MASTER_ADDR" in refused.value.what
    assert "no-such-host.invalid[1-2]" in refused.value.what + refused.value.cause
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


def test_no_warning_ends_a_stage_whatever_the_environment_asks_for():
    program = "from post_training.distributed import logs; import warnings; "
    program += "logs.configure('convert'); warnings.warn('of another package')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=tools.environment(PYTHONWARNINGS="error"),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_network_interface_that_is_not_there_is_named(monkeypatch):
    error = RuntimeError("ifa != nullptr. Unable to find address for: eth9")
    assert session._wrong_interface(error) is error
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth9")
    assert str(session._wrong_interface(error)).startswith("GLOO_SOCKET_IFNAME=eth9\n")
