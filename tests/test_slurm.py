"""Stages as jobs of a real SLURM: two nodes, both launch styles, pipeline, failures, requeueing.

Debian's ``slurm-wlm`` and ``munge`` are installed if need be, which takes root and Debian; anywhere
else the whole file is skipped and says so. Models are tiny and random, processes run on the CPU.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
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
    conversations(folder / "chat.jsonl")
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
                "--calib-max-sequence-length 8",
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
        assert time.monotonic() - killed < 60
        time.sleep(0.2)
    for style in jobs:
        assert "error: rank 1 on host node2 is lost" in (tmp_path / f"{style}.log").read_text()
    # srun waits for news of node2 until SLURM gives it up; an administrator may be faster.
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    for job in jobs.values():
        found = cluster.wait(job, 60)
        assert (found["JobState"], found["Restarts"]) == ("NODE_FAIL", "0")
    cluster.restart_node("node2")


def wait_for_text(log: Path, text: str, cluster, job: str, seconds: float = 120) -> None:
    """Wait until a running job's log has ``text``."""
    end = time.monotonic() + seconds
    while not (log.is_file() and text in log.read_text()):
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "RUNNING"), log.read_text() if log.is_file() else state
        assert time.monotonic() < end, log.read_text() if log.is_file() else "no log"
        time.sleep(0.2)


def is_rank(pid: int) -> bool:
    """Whether this is a stage's process: not its launcher, whose words are the same."""
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return b"torch.distributed.run" not in words and any(
            word.endswith(b"/quantize.py") for word in words
        )
    return False


def settings(model: Path) -> dict[str, dict[str, str]]:
    """The stages' own variables on each road."""
    score = f"--mmlu-dataset {model}/questions --mmlu-batch-size 8"
    training = (
        f"--finetune-data-files {model}/chat.jsonl --seq-length 64 --train-iters 3 --eval-iters 1"
    )
    sizes = '--prune-export-config {"num_layers":4,"hidden_size":96}'
    return {
        "quantize": {
            "QUANTIZE_ARGS": quantize_flags(model), "QUANTIZE_TP": "2",
            "QUANTIZE_SBATCH": "--nodes=2", "MMLU_ARGS": score,
        },
        "prune": {
            "PRUNE_ARGS": f"{sizes} {quantize_flags(model, 2)}", "DISTILL_ARGS": training,
            "MMLU_ARGS": score,
        },
        "eagle3": {
            "EAGLE3_ARGS": f"{training} --draft-vocab-size 64",
            "VALIDATE_ARGS": f"--prompts-path {model}/chat.jsonl --prompts-limit 4 --osl 4",
        },
    }  # fmt: skip


def test_the_roads_run_to_their_ends_stop_where_a_stage_fails_and_go_on_from_there(
    cluster, site, model, tmp_path
):
    """All three side by side."""
    own = settings(model)

    def pipeline(road: str, *words: str, code: int = 0, **more: str) -> tuple[str, list[str]]:
        """Submit a road; returns what is printed and the jobs' numbers."""
        work = tmp_path / road
        work.mkdir(exist_ok=True)
        added = {name: f"{own[road][name]} {value}" for name, value in more.items()}
        text = submit(
            *("bash", site / "slurm" / "pipeline.sh", *words, road, "org/name"),
            environment=variables(cluster, model, work, **{**own[road], **added}),
            cwd=work,
            code=code,
        )  # fmt: skip
        return text, re.findall(r": job (\d+)", text)

    def together(**more: dict[str, str]) -> dict[str, tuple[str, list[str]]]:
        with ThreadPoolExecutor() as pool:
            found = {road: pool.submit(pipeline, road, **more.get(road, {})) for road in own}
            return {road: each.result() for road, each in found.items()}

    # A score below its bar, training that ends too early, a draft that is not good enough.
    started = together(
        quantize={"MMLU_ARGS": "--lower-bound 1"},
        prune={"DISTILL_ARGS": "--exit-interval 2"},
        eagle3={"VALIDATE_ARGS": "--lower-bound 2"},
    )
    reasons = {
        "quantize": (
            "mmlu",
            r"exit code 1 [^$]*error: MMLU accuracy .* below --lower-bound 1.0000",
        ),
        "prune": ("distill", "exit code 75 .* the same command goes on from what was saved"),
        "eagle3": ("validate", r"exit code 1 [^$]*error: acceptance length 1.0 is below 2.0"),
    }
    for road, (text, jobs) in started.items():
        states = [cluster.wait(job, 240)["JobState"] for job in jobs]
        log = Path(re.search(r"tail -n \+1 -F (\S+)", text)[1]).read_text()
        cancelled = ["CANCELLED"] * (len(jobs) - 3)
        assert states == ["COMPLETED", "COMPLETED", "FAILED", *cancelled], log
        stage, reason = reasons[road]
        assert re.search(rf"{stage} \(job \d+\): FAILED with {reason}", log), log
        ends = [tmp_path / road / "org" / f"name_{kind}" for kind in ("export", "draft")]
        assert not any(end.exists() for end in ends)

    # Without that: the first two stages are left as they are, and the roads go on to their ends.
    for road, (text, jobs) in together().items():
        kept = re.findall(r"(\w+): \S+ is still valid", text)
        assert kept == ["convert", road]
        states = [cluster.wait(job, 240)["JobState"] for job in jobs]
        assert states == ["COMPLETED"] * (3 if road == "prune" else 2), text

    def manifest(road: str, output: str) -> dict:
        return json.loads((tmp_path / road / "org" / output / "run.json").read_text())

    exported = tmp_path / "quantize" / "org" / "name_export"
    assert json.loads((exported / "hf_quant_config.json").read_text())
    made = manifest("quantize", "name_quant")
    assert made["configuration"]["tensor_model_parallel_size"] == 2
    config, names = read_model(tmp_path / "prune" / "org" / "name_export")
    assert (config["num_hidden_layers"], config["hidden_size"]) == (4, 96)
    assert names["model.embed_tokens.weight"] == [512, 96]
    assert manifest("prune", "name_distilled")["metrics"]["iteration"] == 3
    # It went on where it was, and says so: the pruned model is what it was made from.
    inputs = {each["role"]: each["path"] for each in manifest("prune", "name_distilled")["inputs"]}
    assert [Path(inputs[role]).name for role in ("model", "teacher")] == ["name_pruned", "name_mlm"]
    config, names = read_model(tmp_path / "eagle3" / "org" / "name_draft")
    assert (config["draft_vocab_size"], names["lm_head.weight"]) == (64, [64, 128])
    report = json.loads((tmp_path / "eagle3" / "org" / "name-Eagle3.validate.json").read_text())
    assert report["acceptance"]["identical_answers"] == report["acceptance"]["answers"] == 4

    # Nothing is left to do.
    for road, (text, jobs) in together().items():
        assert (text.count("is still valid"), jobs) == (5 if road == "prune" else 4, []), text
        assert "nothing to do" in text
    text, jobs = pipeline("quantize", "--dry-run")
    assert jobs == []
    assert text.count("launch line") == 4
    assert "srun --nodes=2 --ntasks=2" in text
    # Training is not dropped, nor gone on with from another model, without a word.
    own["prune"]["PRUNE_ARGS"] = own["prune"]["PRUNE_ARGS"].replace("96", "64")
    text, jobs = pipeline("prune", code=2)
    assert (jobs, "it holds a training run" in text) == ([], True), text


def read_model(folder: Path) -> tuple[dict, dict[str, list[int]]]:
    """A model's configuration and its tensors' shapes; transformers' names where it loads them."""
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    config = json.loads((folder / "config.json").read_text())
    if "draft_vocab_size" not in config:
        model = AutoModelForCausalLM.from_pretrained(folder)
        return config, {name: list(each.shape) for name, each in model.named_parameters()}
    with safe_open(folder / "model.safetensors", "pt") as content:
        names = list(content.keys())
        return config, {name: list(content.get_slice(name).get_shape()) for name in names}


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
    cluster, site, model, two_nodes, tmp_path
):
    """A draft over two nodes, asked as before a time limit (SIGUSR1 to the batch script); beside it
    a distillation, asked so before it has begun, then as before a preemption (SIGTERM)."""
    flags = (
        f"--fp32 --finetune-data-files {model}/chat.jsonl --seq-length 64 --global-batch-size 2 "
        "--lr 2e-3 --log-interval 1 --eval-interval 8 --eval-iters 1 --save-interval 3"
    )
    draft = {"TP": "2", "MLM_EXTRA_ARGS": f"{flags} --train-iters 20 --draft-vocab-size 64"}
    student = {
        "MLM_MODEL_CKPT": str(two_nodes[0] / "one node"), "TEACHER_CKPT": str(model / "source"),
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
        run = start("distill", 1, "student", MLM_REQUEUE="1", **student)
        whole = start("distill", 1, "whole student", **student)
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
            assert "going on after iteration" in text
            assert text.count("finished after") == 1
            assert run.curve() == whole.curve()
            trained = [each["iteration"] for each in run.curve() if each["kind"] == "train"]
            assert trained == list(range(1, iterations + 1))
            assert "the time limit is near: the stage is asked to save" in text


@dataclass
class Run:
    """A training job."""

    cluster: slurm_cluster.Cluster
    job: str
    folder: Path
    log: Path

    def curve(self) -> list[dict]:
        """Its metrics, without those of the machine."""
        from post_training import training_checkpoint, training_metrics

        folder = self.folder / training_checkpoint.FOLDER
        if not (folder / "metrics.jsonl").is_file():
            return []
        return [
            {key: value for key, value in line.items() if key not in training_metrics.MACHINE}
            for line in training_metrics.read(folder)
        ]

    def wait_for_iteration(self, number: int) -> None:
        end = time.monotonic() + 120
        while not any(line["iteration"] >= number for line in self.curve()):
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)

    def wait_for_restart(self, count: int) -> None:
        wait_for_restart(self.cluster, self.job, count, self.log)


def wait_for_restart(cluster, job: str, count: int, log: Path) -> None:
    """Wait until the job runs again. SLURM would wait two minutes before it starts it."""
    end = time.monotonic() + 120
    queued = None
    found = cluster.job(job)
    while int(found["Restarts"]) < count or found["JobState"] != "RUNNING":
        assert time.monotonic() < end, log.read_text()
        assert found["JobState"] not in ("FAILED", "NODE_FAIL"), log.read_text()
        if found["JobState"] == "PENDING":
            queued = queued or time.monotonic()
            # In the second of the requeue nodes refuse the job, whose old credential ends then.
            if time.monotonic() > queued + 2:
                # Again and again: SLURM writes its own time once the last step has ended.
                cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        time.sleep(0.2)
        found = cluster.job(job)


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
