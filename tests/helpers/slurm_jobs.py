"""What the tests of SLURM share: a cluster, a site, a model, and jobs to submit and wait for.

A test file takes the fixtures by assignment (``cluster = slurm_jobs.cluster``) and ``MARKS`` as its
``pytestmark``. Debian's ``slurm-wlm`` and ``munge`` are installed if need be, which takes root and
Debian; anywhere else such a file is skipped and says so. Models are tiny and random, processes run
on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm_cluster
import speed
import tools
import torch
from questions import write_questions

needs = os.geteuid() == 0 and Path("/etc/debian_version").is_file()
MARKS = [
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
    tools.write_conversations(folder / "chat.jsonl")
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
    done = speed.run(words, 60, env=environment, cwd=cwd)
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


def wait_for_text(log: Path, text: str, cluster, job: str, seconds: float = 120) -> None:
    """Wait until a running job's log has ``text``."""

    def is_there() -> bool:
        if log.is_file() and text in log.read_text():
            return True
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "RUNNING"), log.read_text() if log.is_file() else state
        return False

    speed.wait(is_there, seconds, f"{text} in {log}")


@dataclass
class Run:
    """A training job."""

    cluster: slurm_cluster.Cluster
    job: str
    folder: Path
    log: Path

    def curve(self) -> list[dict]:
        """Its metrics, without those of the machine."""
        from post_training.training import metrics as training_metrics
        from post_training.training import run_folder

        folder = self.folder / run_folder.FOLDER
        if not (folder / "metrics.jsonl").is_file():
            return []
        return [
            {key: value for key, value in line.items() if key not in training_metrics.MACHINE}
            for line in training_metrics.read(folder)
        ]

    def wait_for_iteration(self, number: int) -> None:
        speed.wait(
            lambda: any(line["iteration"] >= number for line in self.curve()),
            120,
            f"iteration {number} in {self.log}",
            pause=0.1,
        )

    def wait_for_restart(self, count: int) -> None:
        wait_for_restart(self.cluster, self.job, count, self.log)


def wait_for_restart(cluster, job: str, count: int, log: Path) -> None:
    """Wait until the job has started again ``count`` times.

    SLURM delays a start until the nodes have forgotten the credential of the one before.
    """

    def runs_again() -> bool:
        found = cluster.job(job)
        assert found["JobState"] not in ("FAILED", "NODE_FAIL"), log.read_text()
        return int(found["Restarts"]) >= count and found["JobState"] == "RUNNING"

    speed.wait(runs_again, 120, f"restart {count} of job {job}, log {log}")
