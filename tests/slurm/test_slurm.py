"""A stage as a job of a real SLURM: two nodes, both launch styles, layouts, a lost node, plans."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import slurm_jobs
import speed
import tools
import torch
from slurm_jobs import (
    TOKEN,
    finished,
    number,
    quantize_flags,
    submit,
    variables,
    wait_for_text,
    weights,
)

cluster, site, model = slurm_jobs.cluster, slurm_jobs.site, slurm_jobs.model
pytestmark = slurm_jobs.MARKS


@pytest.fixture(scope="module")
def two_nodes(cluster, site, model, tmp_path_factory):
    """quantize with TP=2 over two nodes, in both launch styles at the same time, and the same on
    one node: logs, checkpoints, and the processes' command lines while they ran."""
    work = tmp_path_factory.mktemp("two_nodes")
    environment = variables(cluster, model, work)
    # One torchrun per node: a plain sbatch with the original's single string, and every variable
    # in the file that SANDBOX_ENV_SETUP names, none of them exported there.
    file = work / "environment.sh"
    file.write_text(
        f"TP=2\nMLM_MODEL_SAVE='{work}/with torchrun'\nHF_TOKEN={TOKEN}\n"
        f"MLM_EXTRA_ARGS=\"{quantize_flags(model)} --prompts 'one word|two words' "
        '--references={\\"num_layers\\":24}"\n'
    )
    torchrun = submit(
        *("sbatch", "--nodes=2", "--output=torchrun.log", site / "slurm" / "sbatch.sh"),
        "quantize.sh org/name FP8_DEFAULT_CFG",
        environment={**environment, "SANDBOX_ENV_SETUP": str(file)},
        cwd=work,  # not the repository's folder: the job finds that by itself
    )
    tasks = submit(
        *("bash", site / "slurm" / "sbatch.sh", "--nodes=2", "--output=tasks.log"),
        *("quantize.sh", "org/name", "FP8_DEFAULT_CFG"),
        environment={
            **environment,
            "TP": "2",
            "LAUNCH_SCRIPT": "python",
            "MLM_MODEL_SAVE": str(work / "tasks"),
            "MLM_EXTRA_ARGS": quantize_flags(model),
            "HF_TOKEN": TOKEN,
        },
        cwd=work,
    )
    jobs = {"torchrun": number(torchrun), "tasks": number(tasks)}
    with subprocess.Popen(
        ["bash", str(site / "quantize.sh"), "org/name", "FP8_DEFAULT_CFG"],
        env={**environment, "TP": "2", "MLM_MODEL_SAVE": str(work / "one node"),
             "MLM_EXTRA_ARGS": quantize_flags(model)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as one:  # fmt: skip
        listing = ""
        while any(cluster.job(job)["JobState"] in ("PENDING", "RUNNING") for job in jobs.values()):
            listing += subprocess.run(
                ["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True
            ).stdout
            time.sleep(0.5)
        output = one.communicate()[0]
    assert one.returncode == 0, output
    logs = {style: finished(cluster, job) for style, job in jobs.items()}
    return work, logs, listing, jobs


@pytest.mark.parametrize("style", ["with torchrun", "tasks"])
def test_two_nodes_make_the_checkpoint_of_one(two_nodes, style):
    work = two_nodes[0]
    expected, found = weights(work / "one node"), weights(work / style)
    assert found.keys() == expected.keys()
    assert any("amax" in name for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_both_styles_have_a_process_on_each_node(two_nodes):
    _, logs, listing, _ = two_nodes
    for log in logs.values():
        assert "started on node[1-2]" in log
        assert "2 processes on CPU: TP=2" in log
        assert re.search(r"quantize \(job \d+\): finished after \d+ s", log)
    for node in (0, 1):
        assert re.search(
            rf"--nproc_per_node=1 --nnodes=2 --node_rank={node} --master_addr=\S+ "
            rf"--master_port=\d+ \S+quantize.py",
            listing,
        )


def test_flags_with_spaces_and_json_arrive_whole(two_nodes):
    work = two_nodes[0]
    configuration = json.loads((work / "with torchrun" / "run.json").read_text())["configuration"]
    assert configuration["prompts"] == "one word|two words"
    assert configuration["references"] == '{"num_layers":24}'


def test_the_token_is_in_no_log_manifest_job_script_or_process_listing(two_nodes, cluster):
    work, logs, listing, jobs = two_nodes
    texts = [*logs.values(), listing]
    for job in jobs.values():
        texts.append(cluster.run("scontrol", "show", "job", job).stdout)
        texts.append(cluster.run("scontrol", "write", "batch_script", job, "-").stdout)
    texts += [path.read_text() for path in work.rglob("run.json")]
    assert len(texts) == 10
    for text in texts:
        assert text
        assert TOKEN not in text


@pytest.mark.parametrize(
    ("words", "sizes", "parts"),
    [
        (["--nodes=2"], {"TP": "3"}, ["3 processes on 2 nodes", "TP=3"]),
        (["-N", "2"], {}, ["1 process on 2 nodes"]),
        (["--nodes=2", "--gpus-per-node=h100:4"], {"TP": "8", "DP": "2"},
         ["16 processes on 2 nodes with 4 GPUs each", "take 4 nodes"]),
        (["--nodes=1", "--gres=gpu:2"], {"TP": "4"}, ["4 processes on 1 node with 2 GPUs each"]),
        (["--nodes=2"], {"TP": "8"}, ["TP=8", "does not divide the model's 4 attention heads"]),
    ],
)  # fmt: skip
def test_a_wrong_layout_is_refused_before_submission(
    words, sizes, parts, cluster, site, model, tmp_path
):
    before = cluster.run("squeue", "--noheader", "--states=all").stdout
    text = submit(
        *("bash", site / "slurm" / "sbatch.sh", *words, "convert.sh", "org/name"),
        environment=variables(cluster, model, tmp_path, **sizes),
        cwd=tmp_path,
        code=2,
    )
    for part in parts:
        assert part in text
    assert cluster.run("squeue", "--noheader", "--states=all").stdout == before


def test_a_stage_that_shares_its_work_uses_all_gpus_of_the_job(cluster, site, model, tmp_path):
    def planned(*words: str, **sizes: str) -> str:
        return submit(
            *("bash", site / "slurm" / "sbatch.sh", *words, "--dry-run"),
            environment=variables(cluster, model, tmp_path, **sizes),
            cwd=tmp_path,
        )

    two = ("--nodes=2", "--gpus-per-node=4")
    assert "8: TP=1 PP=1 CP=1 EP=1 ETP=1 DP=8, on 2 nodes" in planned(*two, "mmlu.sh", "org/name")
    text = planned(*two, "quantize.sh", "org/name", TP="2")
    assert "DP=4, on 2 nodes with 4 each" in text
    text = planned(*two, "quantize.sh", "org/name", TP="2", DP="1")
    assert "note: quantize uses 2 of 8 GPUs" in text
    # Copies would not make a conversion faster.
    text = planned("--nodes=1", "--gpus-per-node=4", "convert.sh", "org/name")
    assert "1: TP=1" in text and "note: convert uses 1 of 4 GPUs" in text


def test_a_job_works_in_a_folder_that_all_nodes_see(cluster, site, model, tmp_path):
    environment = variables(cluster, model, tmp_path)
    del environment["MLM_WORK_DIR"]
    words = ("bash", site / "slurm" / "sbatch.sh", "--nodes=1", "convert.sh", "org/name")
    text = submit(*words, "--dry-run", environment=environment, cwd=tmp_path)
    assert f"--save {tmp_path}/megatron_workspace/org/name_mlm" in text
    # Also where only the set-up file says which folder that is.
    file = tmp_path / "environment.sh"
    file.write_text("USER_FSW=/scratch/me\n")
    environment["SANDBOX_ENV_SETUP"] = str(file)
    text = submit(*words, "--dry-run", environment=environment, cwd=tmp_path)
    assert "--save /scratch/me/megatron_workspace/org/name_mlm" in text


def test_a_lost_node_ends_all_ranks_within_a_minute_by_name_and_starts_nothing_again(
    cluster, site, model, tmp_path
):
    """Everything on node2 dies at once, its daemons too, under both launch styles."""

    def start(style: str, script: str) -> str:
        return number(submit(
            *("bash", site / "slurm" / "sbatch.sh", "--nodes=2", f"--output={tmp_path}/{style}.log",
              "quantize.sh", "org/name"),
            environment=variables(
                cluster, model, tmp_path, TP="2", LAUNCH_SCRIPT=script,
                MLM_MODEL_SAVE=str(tmp_path / style),
                MLM_EXTRA_ARGS=f"{quantize_flags(model, samples=4000)} "
                "--calib-max-sequence-length 8 --calib-batch-size 1",
            ),
            cwd=tmp_path,
        ))  # fmt: skip

    jobs = {"tasks": start("tasks", "python"), "torchrun": start("torchrun", "")}
    for style, job in jobs.items():
        wait_for_text(tmp_path / f"{style}.log", "[quantize] loaded", cluster, job)
    assert len(list(filter(is_rank, cluster.processes_on("node2")))) == 2
    killed = time.monotonic()
    cluster.kill_node("node2")
    while any(map(is_rank, cluster.processes_on("node1"))):
        assert time.monotonic() - killed < speed.scaled(60)
        time.sleep(0.2)
    for style in jobs:
        assert "error: rank 1 on host node2 is lost" in (tmp_path / f"{style}.log").read_text()
    # srun waits for news of node2 until SLURM gives it up; an administrator may be faster.
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    for job in jobs.values():
        found = cluster.wait(job, 60)
        assert (found["JobState"], found["Restarts"]) == ("NODE_FAIL", "0")
    cluster.restart_node("node2")


def is_rank(pid: int) -> bool:
    """Whether this is a stage's process: not its launcher, whose words are the same."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"torch.distributed.run" not in words and any(
            word.endswith(b"/quantize.py") for word in words
        )
    return False


def container_variables(cluster, model: Path, **more: str) -> dict[str, str]:
    return {
        **variables(cluster, model, Path("/scratch/me/work"), TP="2", DP="2"),
        "USER_FSW": "/scratch/me",
        "CONTAINER_IMAGE": "nvcr.io#nvidia/pytorch:x",
        "CONTAINER_MOUNTS": "/data:/data",
        **more,
    }


def test_containers_are_asked_for_as_pyxis_and_apptainer_want_it(site, model, tmp_path, cluster):
    """The step's line; tests/container runs jobs with apptainer. There is no pyxis here."""
    words = ("bash", site / "slurm" / "sbatch.sh", "--nodes=2", "convert.sh", "org/name")

    def step(**more: str) -> str:
        environment = container_variables(cluster, model, **more)
        return step_line(submit(*words, "--dry-run", environment=environment, cwd=tmp_path))

    mounts = f"{site}:/workspace/nmm-sandbox,/scratch/me:/workspace/scratch"
    mounts += f",{site}:{site},/scratch/me:/scratch/me,/data:/data"
    shown = step()
    assert "--container-image=nvcr.io#nvidia/pytorch:x" in shown
    assert f"--container-mounts={mounts} --container-workdir=/workspace/nmm-sandbox" in shown
    assert "--no-container-entrypoint" in shown
    assert shown.endswith("bash /workspace/nmm-sandbox/convert.sh org/name")
    shown = step(CONTAINER_IMAGE="/images/a b.sif", LAUNCH_SCRIPT="python")
    assert "--ntasks=4 --ntasks-per-node=2" in shown
    inside = f"exec --nv --bind {mounts} --pwd /workspace/nmm-sandbox"
    assert f"apptainer {inside} '/images/a b.sif' bash" in shown
    # Where a site has the older name only.
    other = tmp_path / "singularity"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    assert f"singularity {inside}" in step(CONTAINER_RUNTIME="apptainer", PATH=path)
    step(MLM_WORK_DIR="/workspace/scratch/work")
    step(MLM_WORK_DIR="/other/work", CONTAINER_MOUNTS="/other:/other:rw")


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"USER_FSW": ""}, ["USER_FSW (not set)"]),
        ({"USER_FSW": "/a,b"}, ["USER_FSW=/a,b", "without comma or colon"]),
        ({"USER_FSW": "scratch"}, ["USER_FSW=scratch", "named from /"]),
        ({"CONTAINER_MOUNTS": "/a b:/a"}, ["pyxis", "white space"]),
        ({"MLM_WORK_DIR": "/data2/work"}, ["MLM_WORK_DIR=/data2/work", "CONTAINER_MOUNTS="]),
        ({"EXPORT_DIR": "/elsewhere"}, ["EXPORT_DIR=/elsewhere", "what it writes there is lost"]),
        ({"CONTAINER_RUNTIME": "docker"}, ["docker", "pyxis, apptainer or singularity"]),
    ],
)
def test_a_mistake_about_the_container_is_refused_before_submission(
    more, parts, cluster, site, model, tmp_path
):
    before = cluster.run("squeue", "--noheader", "--states=all").stdout
    text = submit(
        *("bash", site / "slurm" / "sbatch.sh", "--nodes=2", "convert.sh", "org/name"),
        environment=container_variables(cluster, model, **more),
        cwd=tmp_path,
        code=2,
    )
    for part in parts:
        assert part in text
    assert cluster.run("squeue", "--noheader", "--states=all").stdout == before


def step_line(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("job step"))


def test_the_plans_in_the_documentation_are_what_the_commands_print():
    text = (tools.ROOT / "slurm" / "README.md").read_text()
    shown = re.findall(r"```sh\n([^`]*--dry-run\n)```\n\n```text\n([^`]*)```", text)
    assert len(shown) == 4
    for command, expected in shown:
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=tools.ROOT,
            env={"PATH": os.environ["PATH"], "PYTHON": sys.executable,
                 "MLM_WORK_DIR": "/scratch/work"},
            capture_output=True,
            text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        found = done.stdout.replace(sys.executable, "python").replace(f"{tools.ROOT}/", "")
        found = re.sub(r"(\.py) --bf16 .*? --tokenizer-model \S+", r"\1 <the conf's flags>", found)
        assert found == expected
