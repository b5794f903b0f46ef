"""Training as a SLURM job: saved at signals, requeued, resumed with the same loss curve."""

from __future__ import annotations

import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import slurm_jobs
import tools
from slurm_jobs import (
    Run,
    finished,
    number,
    quantize_flags,
    submit,
    variables,
    wait_for_restart,
    wait_for_text,
)

from post_training.training import options as training_options

cluster, site, model = slurm_jobs.cluster, slurm_jobs.site, slurm_jobs.model
pytestmark = slurm_jobs.MARKS


@pytest.fixture(scope="module")
def student(model, tmp_path_factory) -> Path:
    """A quantized checkpoint, which differs from its teacher a little."""
    folder = tmp_path_factory.mktemp("student") / "fp8"
    source = ("--pretrained-model-path", model / "source", "--save", folder)
    tools.run("quantize.py", *source, *shlex.split(quantize_flags(model)))
    return folder


def test_training_is_saved_at_signals_queued_again_and_its_loss_curve_is_the_same(
    cluster, site, model, student, tmp_path
):
    """A draft over two nodes, asked as before a time limit (SIGUSR1 to the batch script); beside it
    a distillation, asked so before it has begun, then as before a preemption (SIGTERM)."""
    flags = (
        f"--fp32 --finetune-data-files {model}/chat.jsonl --seq-length 64 --global-batch-size 2 "
        "--lr 2e-3 --log-interval 1 --eval-interval 8 --eval-iters 1 --save-interval 3"
    )
    draft = {"TP": "2", "MLM_EXTRA_ARGS": f"{flags} --train-iters 20 --draft-vocab-size 64"}
    pair = {
        "MLM_MODEL_CKPT": str(student), "TEACHER_CKPT": str(model / "source"),
        "MLM_EXTRA_ARGS": f"{flags} --train-iters 40",
    }  # fmt: skip

    def start(stage: str, nodes: int, name: str, **more: str) -> Run:
        output = submit(
            *("bash", site / "slurm" / "sbatch.sh", f"--nodes={nodes}",
              f"--output={tmp_path}/{name}.log", f"{stage}.sh", "org/name"),
            environment=variables(
                cluster, model, tmp_path, MLM_MODEL_SAVE=str(tmp_path / name), **more
            ),
            cwd=tmp_path,
        )  # fmt: skip
        return Run(cluster, number(output), tmp_path / name, tmp_path / f"{name}.log")

    def train_draft() -> tuple[Run, Run]:
        run = start("eagle3", 2, "draft", MLM_REQUEUE="1", **draft)
        whole = start("eagle3", 2, "whole draft", **draft)
        run.wait_for_iteration(4)
        cluster.run("scancel", "--batch", "--signal=USR1", run.job)
        run.wait_for_restart(1)
        assert cluster.job(run.job)["Requeue"] == "1"
        assert cluster.job(whole.job)["Requeue"] == "0"
        return run, whole

    def distill() -> tuple[Run, Run]:
        run = start("distill", 1, "student", MLM_REQUEUE="1", **pair)
        whole = start("distill", 1, "whole student", **pair)
        wait_for_text(run.log, "started on", cluster, run.job)
        cluster.run("scancel", "--batch", "--signal=USR1", run.job)
        run.wait_for_restart(1)
        assert "ended before training began" in run.log.read_text()
        assert run.curve() == []
        run.wait_for_iteration(4)
        cluster.run("scancel", "--signal=TERM", f"{run.job}.0")
        run.wait_for_restart(2)
        return run, whole

    with ThreadPoolExecutor() as pool:
        stories = [pool.submit(story) for story in (train_draft, distill)]
        for story, iterations in zip(stories, (20, 40), strict=True):
            run, whole = story.result()
            text = finished(cluster, run.job)
            finished(cluster, whole.job)
            assert len(re.findall("saved after .*; queued again", text)) == 1
            assert "resuming after iteration" in text
            assert text.count("finished after") == 1
            assert run.curve() == whole.curve()
            trained = [each["iteration"] for each in run.curve() if each["kind"] == "train"]
            assert trained == list(range(1, iterations + 1))
            assert "the time limit is near: the stage is asked to save" in text


def test_a_job_that_never_saves_is_not_queued_for_ever(cluster, site, model, tmp_path):
    """A program in place of the stage exits as one that is asked to before training begins."""
    log = tmp_path / "idle.log"
    flags = f"--finetune-data-files {model}/chat.jsonl --train-iters 3 --seq-length 64"
    job = number(submit(
        *("bash", site / "slurm" / "sbatch.sh", "--nodes=1", f"--output={log}", "eagle3.sh",
          "org/name"),
        environment=variables(
            cluster, model, tmp_path, MLM_REQUEUE="1", MLM_EXTRA_ARGS=flags,
            # Long enough to be seen while it runs.
            LAUNCH_SCRIPT=f"bash -c 'sleep 5; exit {training_options.EXIT_UNFINISHED}'",
        ),
        cwd=tmp_path,
    ))  # fmt: skip
    for restart in (1, 2):
        wait_for_restart(cluster, job, restart, log)
    found = cluster.wait(job, 60)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "2")
    assert "ended 3 times in a row before anything was saved: raise --time" in log.read_text()
