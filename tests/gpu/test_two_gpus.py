"""On two GPUs, through NCCL: every stage computes at TP=2, PP=2 and DP=2 what it does on one.

float32, so that only the order of additions differs (CPU tests say the same with gloo); drafts also
in bfloat16, the type whose attention runs in the flash kernel. A lost rank ends the other while it
waits in an NCCL call.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tools
import torch
from questions import write_questions

from post_training.training import metrics as training_metrics
from post_training.training import run_folder

pytestmark = [
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
    pytest.mark.timeout(600),
]
LENGTH = 64
LAYOUTS = {
    "one": tools.LAYOUTS["TP=1"],
    **{name: tools.LAYOUTS[name] for name in ("TP=2", "PP=2")},
    "DP=2": (2, ()),
}
SEVERAL = [name for name in LAYOUTS if name != "one"]
TRAINING = (
    *("--seq-length", LENGTH, "--train-iters", 6, "--global-batch-size", 4),
    *("--micro-batch-size", 2, "--lr", 1e-3, "--log-interval", 1, "--eval-iters", 0),
)


def jobs_of(root: Path, layout: str) -> list[tuple[str, tuple[object, ...]]]:
    """What runs at a layout, one stage after the other in the same processes."""
    sizes = LAYOUTS[layout][1]
    work = root / layout
    hf = ("--pretrained-model-path", root / "hf")
    text = ("--calib-dataset-path-or-name", root / "text.jsonl", "--calib-size", 8)
    text += ("--calib-max-sequence-length", LENGTH, "--skip-generate")
    chat = ("--finetune-data-files", root / "chat.jsonl")

    def stage(name: str, *flags: object, precision: str = "--fp32"):
        return (name, (*sizes, *flags, precision))

    # On a GPU each rank draws its part of a draft: all layouts go on from one draft.
    drafted, drafted_bf16 = ("--load", root / "drafted"), ("--load", root / "drafted bf16")
    return [
        stage("convert", *hf, "--save", work / "mlm"),
        stage("quantize", "--load", work / "mlm", "--save", work / "fp8", *text),
        tools.logits_job(work / "logits", tools.tokens(), *sizes, "--load", work / "mlm", "--fp32"),
        tools.logits_job(work / "fp8 logits", tools.tokens(), *sizes, "--load", work / "fp8",
                         "--fp32"),
        stage("eagle3", *drafted, *chat, *TRAINING, "--save", work / "draft"),
        stage("eagle3", *drafted_bf16, *chat, *TRAINING, "--save", work / "bf16 draft",
              precision="--bf16"),
        stage("distill", "--load", work / "fp8", "--teacher", root / "hf", "--save",
              work / "distilled", "--finetune-data-files", root / "text.jsonl", *TRAINING),
        stage("mmlu", "--load", work / "mlm", "--mmlu-dataset", root / "questions", "--few-shots",
              2, "--mmlu-batch-size", 3, "--mmlu-output", work / "mmlu.json"),
        stage("generate", "--load", work / "mlm", "--prompts-path", root / "prompts.jsonl",
              "--output", work / "answers.jsonl", "--max-new-tokens", 8,
              "--generate-batch-size", 2),
        stage("validate", "--load", work / "draft", "--prompts-path", root / "prompts.jsonl",
              "--steps", 2, "--osl", 8, "--validate-output", work / "validate.json"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Every stage at every layout; the layouts run side by side."""
    root = tmp_path_factory.mktemp("two_gpus")
    tools.random_model(root / "hf", "qwen3", max_position_embeddings=2048)
    tools.write_texts(root / "text.jsonl", 80)
    tools.write_conversations(root / "chat.jsonl", 120)
    prompts = [{"prompt": f"Question {n}: " + "why? " * (n % 3 + 1)} for n in range(6)]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    (root / "questions").mkdir()
    write_questions(root / "questions")

    draft = ("--pretrained-model-path", root / "hf", "--algorithm", "eagle3")
    tools.run_stages(
        ("convert", (*draft, "--fp32", "--save", root / "drafted")),
        ("convert", (*draft, "--bf16", "--save", root / "drafted bf16")),
    )

    def run(layout: str) -> None:
        (root / layout).mkdir()
        done = tools.run_stages(*jobs_of(root, layout), processes=LAYOUTS[layout][0])
        said = done.stdout + done.stderr
        assert layout == "one" or "2 processes on NVIDIA" in said
        assert "Mismatched keys: [(" not in said

    with ThreadPoolExecutor(len(LAYOUTS)) as pool:
        list(pool.map(run, LAYOUTS))
    return root


def curve(folder: Path) -> list[float]:
    lines = training_metrics.read(folder / run_folder.FOLDER)
    return [line["loss"] for line in lines if line["kind"] == "train"]


@pytest.mark.parametrize("layout", SEVERAL)
@pytest.mark.parametrize("name", ["logits", "fp8 logits"])
def test_logits_are_those_of_one_gpu(root, layout, name):
    expected, found = (tools.read_logits(root / each / name) for each in ("one", layout))
    # An input next to the middle between two FP8 values may be rounded to the other one.
    tolerance = 1e-4 if name == "logits" else 2e-2
    assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("layout", SEVERAL)
@pytest.mark.parametrize(
    ("name", "tolerance"), [("draft", 1e-4), ("distilled", 2e-2), ("bf16 draft", 1e-2)]
)
def test_training_has_the_loss_curve_of_one_gpu(root, layout, name, tolerance):
    expected = curve(root / "one" / name)
    assert len(expected) == 6
    assert curve(root / layout / name) == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("layout", SEVERAL)
def test_scores_and_answers_are_those_of_one_gpu(root, layout):
    def scores(layout: str) -> dict:
        return json.loads((root / layout / "mmlu.json").read_text())["answers"]

    assert scores(layout) == scores("one")
    answers = [(root / each / "answers.jsonl").read_text() for each in ("one", layout)]
    assert answers[0] == answers[1]
    report = json.loads((root / layout / "validate.json").read_text())
    assert report["acceptance"]["acceptance_length"] >= 1


def test_checkpoints_of_two_gpus_are_exported_on_one(root):
    names = {"mlm": "hf", "fp8": "fp8_hf"}
    jobs = [
        ("export", ("--load", root / layout / name, "--fp32", "--export-dir", root / layout / to))
        for layout in SEVERAL
        for name, to in names.items()
    ]
    # Each export is read back and compared before it gets its name.
    tools.run_stages(*jobs)
    for layout in SEVERAL:
        assert (root / layout / "hf" / "config.json").is_file()
        assert (root / layout / "fp8_hf" / "hf_quant_config.json").is_file()


def test_a_lost_rank_ends_the_other_that_waits_for_it_in_nccl(root, tmp_path):
    words = tools.command(
        "quantize.py", *LAYOUTS["TP=2"][1], "--load", root / "one" / "mlm", "--save",
        tmp_path / "q", "--calib-dataset-path-or-name", root / "text.jsonl", "--calib-size", 5000,
        "--calib-max-sequence-length", 4, "--skip-generate", "--fp32", processes=2,
    )  # fmt: skip
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, cwd=tools.ROOT, env=tools.environment(), stdout=output, stderr=output
        )
    try:
        end = time.monotonic() + 180
        while "loaded" not in log.read_text():
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.2)
        time.sleep(2)
        ranks = {
            int(rank): int(entry.name)
            for entry in Path("/proc").iterdir()
            if entry.name.isdecimal()
            for rank in re.findall(rb"\0RANK=(\d)\0", _environ(entry))
            if str(tmp_path).encode() in _read(entry / "cmdline")
        }
        started = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        process.wait(90)
        assert time.monotonic() - started < 60
        assert process.returncode != 0
        assert "error: rank 1 on host" in log.read_text()
        assert not (tmp_path / "q").exists()
    finally:
        process.kill()


def _environ(entry: Path) -> bytes:
    return b"\0" + _read(entry / "environ")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
