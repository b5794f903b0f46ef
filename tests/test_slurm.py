"""Stages as jobs of a real SLURM: two nodes, both launch styles, pipeline, failures, requeueing.

Debian's ``slurm-wlm`` and ``munge`` are installed if need be, which takes root and Debian; anywhere
else the whole file is skipped and says so. Models are tiny and random, processes run on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import slurm_cluster
import tools
import torch
from test_mmlu_stage import write_questions

needs = os.geteuid() == 0 and Path("/etc/debian_version").is_file()
pytestmark = [
    pytest.mark.skipif(not needs, reason="NOT TESTED: SLURM's tests need root on Debian"),
    pytest.mark.slow,
]
TOKEN = "hf_" + "Secret" * 6
CONF = """
HF_MODEL_CKPT=org/name
MODEL_ARGS="--bf16 --num-layers 6 --hidden-size 128 --ffn-hidden-size 256 \\
  --num-attention-heads 4 --group-query-attention --num-query-groups 2 --kv-channels 64 \\
  --qk-layernorm --disable-bias-linear --swiglu --normalization RMSNorm --norm-epsilon 1e-6 \\
  --position-embedding-type rope --rotary-base 10000 --padded-vocab-size 512"
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    slurm_cluster.install()
    with slurm_cluster.Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The repository as a site without GPUs has it: sbatch.sh's EDIT lines changed, all else the
    same. Links, so that it is this very code that runs."""
    root = tmp_path_factory.mktemp("site")
    for path in tools.ROOT.iterdir():
        if path.suffix in (".py", ".sh") or path.name in ("conf", "post_training"):
            (root / path.name).symlink_to(path)
    shutil.copytree(tools.ROOT / "slurm", root / "slurm")
    script = root / "slurm" / "sbatch.sh"
    lines = script.read_text().splitlines(keepends=True)
    assert sum("# EDIT" in line for line in lines) == 5
    script.write_text("".join(line for line in lines if "--gpus-per-node" not in line))
    return root


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a tiny model, calibration text, questions, and a conf for the model."""
    folder = tmp_path_factory.mktemp("model")
    tools.random_model(folder / "source", "qwen3", torch.bfloat16)
    lines = [json.dumps({"text": f"{n}: the quick brown fox jumps. " * 9}) for n in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    (folder / "questions").mkdir()
    write_questions(folder / "questions")
    conf = folder / "conf" / "model" / "org" / "name.sh"
    conf.parent.mkdir(parents=True)
    conf.write_text(CONF)
    return folder


def variables(cluster, model: Path, work: Path, **more: str) -> dict[str, str]:
    """A user's environment on the login node; jobs inherit it."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    return {
        **{name: value for name, value in os.environ.items() if name not in names},
        **cluster.environment,
        "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1",
        "SANDBOX_ROOT": str(model),
        "HF_MODEL_CKPT": str(model / "source"),
        "MLM_WORK_DIR": str(work),
        **more,
    }


def submit(*words: object, environment: dict[str, str], cwd: Path, code: int = 0) -> str:
    """Run a submitting command; returns what it prints."""
    done = subprocess.run(
        [str(word) for word in words],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def number(text: str) -> str:
    return re.search(r"Submitted batch job (\d+)", text)[1]


def finished(cluster, job: str, state: str = "COMPLETED", seconds: float = 180) -> str:
    """Wait for a job and require its end; returns its log."""
    found = cluster.wait(job, seconds)
    log = Path(found["StdOut"])
    text = log.read_text() if log.is_file() else ""
    assert found["JobState"] == state, f"{found}\n{text}"
    return text


def quantize_flags(model: Path, samples: int = 4) -> str:
    return (
        f"--calib-dataset-path-or-name {model}/text.jsonl --calib-size {samples} "
        "--calib-max-sequence-length 64 --skip-generate"
    )


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, scales included, by name."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(checkpoint / "release"),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )

    def flat(value: object, name: str):
        if isinstance(value, dict):
            for key, entry in value.items():
                yield from flat(entry, f"{name}.{key}")
        elif isinstance(value, torch.Tensor):
            yield name, value

    return dict(flat(state, ""))


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
        cwd=site,
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
    listing = ""
    while any(cluster.job(job)["JobState"] in ("PENDING", "RUNNING") for job in jobs.values()):
        listing += subprocess.run(
            ["ps", "-ww", "-eo", "args"], capture_output=True, text=True, check=True
        ).stdout
        time.sleep(0.5)
    logs = {style: finished(cluster, job) for style, job in jobs.items()}
    one = subprocess.run(
        ["bash", str(site / "quantize.sh"), "org/name", "FP8_DEFAULT_CFG"],
        env={**environment, "TP": "2", "MLM_MODEL_SAVE": str(work / "one node"),
             "MLM_EXTRA_ARGS": quantize_flags(model)},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert one.returncode == 0, one.stderr
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
        (["-N", "2"], {}, ["1 processes on 2 nodes"]),
        (["--nodes=2", "--gpus-per-node=h100:4"], {"TP": "8", "DP": "2"},
         ["16 processes on 2 nodes with 4 GPUs each", "take 4 nodes"]),
        (["--nodes=1", "--gres=gpu:2"], {"TP": "4"}, ["4 processes on 1 nodes with 2 GPUs each"]),
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
    assert "note: 2 of 8 GPUs are used" in text
    # Copies would not make a conversion faster.
    text = planned("--nodes=1", "--gpus-per-node=4", "convert.sh", "org/name")
    assert "1: TP=1" in text and "note: 1 of 4 GPUs are used" in text


def test_a_lost_rank_ends_all_ranks_within_a_minute_by_name(cluster, site, model, tmp_path):
    output = submit(
        *("bash", site / "slurm" / "sbatch.sh", "--nodes=2", "quantize.sh", "org/name"),
        environment=variables(
            cluster, model, tmp_path, TP="2", LAUNCH_SCRIPT="python",
            MLM_EXTRA_ARGS=quantize_flags(model, samples=400) + " --calib-max-sequence-length 8",
        ),
        cwd=tmp_path,
    )  # fmt: skip
    job = number(output)
    log = tmp_path / f"post-training-{job}.log"
    end = time.monotonic() + 120
    while not (log.is_file() and "loaded" in log.read_text()):
        assert time.monotonic() < end
        assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), log.read_text()
        time.sleep(0.2)
    killed = time.monotonic()
    lost = [pid for pid in cluster.processes_on("node2") if is_rank(pid)]
    assert len(lost) == 1
    os.kill(lost[0], signal.SIGKILL)
    text = finished(cluster, job, "FAILED", 60)
    assert time.monotonic() - killed < 60
    assert "error: rank 1 on host node2 is lost" in text
    assert "srun: error: node2: task 1: Killed" in text
    assert re.search(r"quantize \(job \d+\): FAILED with exit code \d+ after \d+ s", text)
    left = [pid for node in ("node1", "node2") for pid in cluster.processes_on(node)]
    assert not any(map(is_rank, left))


def is_rank(pid: int) -> bool:
    with suppress(OSError):
        return b"quantize.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def pipeline(cluster, site, model, work: Path, *words: str, **more: str) -> tuple[str, list[str]]:
    """Submit the quantize road; returns what it prints and the jobs' numbers."""
    environment = variables(
        cluster, model, work, QUANTIZE_ARGS=quantize_flags(model), QUANTIZE_TP="2",
        QUANTIZE_SBATCH="--nodes=2", **more,
    )  # fmt: skip
    text = submit(
        *("bash", site / "slurm" / "pipeline.sh", *words, "quantize", "org/name"),
        environment=environment,
        cwd=work,
    )
    return text, re.findall(r": job (\d+)", text)


def test_a_pipeline_runs_stops_where_it_fails_and_goes_on_from_there(
    cluster, site, model, tmp_path
):
    score = f"--mmlu-dataset {model}/questions --mmlu-batch-size 8"
    # The bar is out of reach: scoring fails, and the export that waits for it is cancelled.
    text, jobs = pipeline(cluster, site, model, tmp_path, MMLU_ARGS=score + " --lower-bound 1")
    watch = re.search(r"tail -n \+1 -F (\S+)", text)[1]
    states = [cluster.wait(job, 240)["JobState"] for job in jobs]
    log = Path(watch).read_text()
    assert states == ["COMPLETED", "COMPLETED", "FAILED", "CANCELLED"], log
    assert "FAILED with exit code 1" in log
    assert "error: MMLU accuracy" in log
    assert "below --lower-bound 1.0000" in log
    assert not (tmp_path / "org" / "name_export").exists()

    # Without it the first two stages are left as they are, and the road goes on to its end.
    text, jobs = pipeline(cluster, site, model, tmp_path, MMLU_ARGS=score)
    assert re.findall(r"(\w+): \S+ is still valid", text) == ["convert", "quantize"]
    assert [cluster.wait(job, 240)["JobState"] for job in jobs] == ["COMPLETED"] * 2
    exported = tmp_path / "org" / "name_export"
    assert json.loads((exported / "hf_quant_config.json").read_text())
    made = json.loads((tmp_path / "org" / "name_quant" / "run.json").read_text())
    assert made["configuration"]["tensor_model_parallel_size"] == 2

    # Nothing is left to do; another format is made anew.
    text, jobs = pipeline(cluster, site, model, tmp_path, MMLU_ARGS=score)
    assert (text.count("is still valid"), jobs) == (4, [])
    assert "nothing to do" in text
    words = ["--dry-run"]
    text, jobs = pipeline(cluster, site, model, tmp_path, *words, MMLU_ARGS=score)
    assert jobs == []
    assert text.count("launch line") == 4
    assert "srun --nodes=2 --ntasks=2" in text


def test_a_pipeline_with_a_mistake_submits_nothing(cluster, site, model, tmp_path):
    before = cluster.run("squeue", "--noheader", "--states=all").stdout
    for more, part in [
        ({"EXPORT_ARGS": "--max-shard-sizes 3"}, "--max-shard-size"),
        ({"MMLU_TP": "3"}, "TP=3"),
        ({"MMLU_ARGS": "--mmlu-dataset '/no such/folder'"}, "/no such/folder"),
    ]:
        text = submit(
            *("bash", site / "slurm" / "pipeline.sh", "quantize", "org/name"),
            environment=variables(
                cluster, model, tmp_path, **{"QUANTIZE_ARGS": quantize_flags(model), **more}
            ),
            cwd=tmp_path,
            code=2,
        )
        assert part in text
    assert cluster.run("squeue", "--noheader", "--states=all").stdout == before


def conversations(path: Path) -> None:
    turns = [
        [
            {"role": "user", "content": f"What is {i} plus {i}?"},
            {"role": "assistant", "content": f"It is {2 * i}." + " Sure." * (i % 4)},
        ]
        for i in range(60)
    ]
    path.write_text("\n".join(json.dumps({"messages": each}) for each in turns))


def test_training_is_saved_at_signals_queued_again_and_its_loss_curve_is_the_same(
    cluster, site, model, tmp_path
):
    """Over two nodes: asked as before a time limit (SIGUSR1 to the batch script), then as before a
    preemption (SIGTERM to the tasks)."""
    from post_training import training_checkpoint, training_metrics

    conversations(tmp_path / "chat.jsonl")
    flags = (
        f"--fp32 --finetune-data-files {tmp_path}/chat.jsonl --seq-length 64 --train-iters 24 "
        "--global-batch-size 2 --lr 2e-3 --log-interval 1 --eval-interval 8 --eval-iters 1 "
        "--save-interval 10 --draft-vocab-size 64"
    )

    def start(name: str, **more: str) -> str:
        return number(submit(
            *("bash", site / "slurm" / "sbatch.sh", "--nodes=2", "--requeue", "eagle3.sh",
              "org/name"),
            environment=variables(
                cluster, model, tmp_path, TP="2", MLM_EXTRA_ARGS=flags,
                MLM_MODEL_SAVE=str(tmp_path / name), **more,
            ),
            cwd=tmp_path,
        ))  # fmt: skip

    def curve(name: str) -> list[dict]:
        folder = tmp_path / name / training_checkpoint.FOLDER
        if not (folder / "metrics.jsonl").is_file():
            return []
        return [
            {key: value for key, value in line.items() if key not in training_metrics.MACHINE}
            for line in training_metrics.read(folder)
        ]

    def wait_for_iteration(number: int) -> None:
        end = time.monotonic() + 120
        while not any(line["iteration"] >= number for line in curve("interrupted")):
            assert time.monotonic() < end, log()
            time.sleep(0.1)

    interrupted = start("interrupted", MLM_REQUEUE="1")

    def log() -> str:
        path = tmp_path / f"post-training-{interrupted}.log"
        return path.read_text() if path.is_file() else "no log"

    wait_for_iteration(3)
    cluster.run("scancel", "--batch", "--signal=USR1", interrupted)
    wait_for_restarts(cluster, interrupted, 1, log)
    whole = start("whole")
    saved = len(curve("interrupted"))
    wait_for_iteration(curve("interrupted")[-1]["iteration"] + 3)
    cluster.run("scancel", "--signal=TERM", f"{interrupted}.0")
    wait_for_restarts(cluster, interrupted, 2, log)
    finished(cluster, interrupted)
    finished(cluster, whole)
    text = log()
    assert "the time limit is near: the stage is asked to save" in text
    assert len(re.findall("saved after .*; queued again", text)) == 2
    assert text.count("finished after") == 1
    assert saved < len(curve("interrupted"))
    assert curve("interrupted") == curve("whole")
    assert [line["iteration"] for line in curve("whole") if line["kind"] == "train"][-1] == 24


def wait_for_restarts(cluster, job: str, count: int, log) -> None:
    """Wait until the job is queued again, and let it start at once: SLURM waits two minutes."""
    end = time.monotonic() + 60
    while int(cluster.job(job)["Restarts"]) < count or cluster.job(job)["JobState"] != "PENDING":
        assert time.monotonic() < end, log()
        time.sleep(0.2)
    time.sleep(2)  # SLURM revokes a job's credential by the second: too early, it fails at once
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")


def container_variables(cluster, model: Path, **more: str) -> dict[str, str]:
    return {
        **variables(cluster, model, Path("/scratch/me/work"), TP="2", DP="2"),
        "USER_FSW": "/scratch/me",
        "CONTAINER_IMAGE": "nvcr.io#nvidia/pytorch:x",
        "CONTAINER_MOUNTS": "/data:/data",
        **more,
    }


def test_containers_are_asked_for_as_pyxis_and_apptainer_want_it(site, model, tmp_path, cluster):
    """The step's line; tests/test_container.py runs jobs with apptainer. There is no pyxis here."""
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
    assert rf"apptainer {inside} /images/a\ b.sif bash" in shown
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
    line = next(line for line in text.splitlines() if line.startswith("job step"))
    # Commas need no quoting for a shell, but printf's %q quotes them.
    return line.replace("\\,", ",").replace("\\#", "#")


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
