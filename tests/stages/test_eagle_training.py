"""Training a draft: ModelOpt's loss, the same at every layout, online as offline, and resumable."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import speed
import tools

from post_training.common import manifest
from post_training.drafts import features as draft_features
from post_training.training import metrics as training_metrics
from post_training.training import run_folder
from post_training.training.options import EXIT_UNFINISHED

ITERATIONS = 8
LAYOUTS = {
    "TP=2": tools.LAYOUTS["TP=2"],
    "TP=2 split": (2, (*tools.LAYOUTS["TP=2"][1], "--sequence-parallel")),
    "PP=2": tools.LAYOUTS["PP=2"],
}
STEPS = (
    "--fp32", "--seq-length", 128, "--train-iters", ITERATIONS, "--global-batch-size", 4,
    "--micro-batch-size", 2, "--lr", 2e-3, "--log-interval", 2, "--eval-interval", 4,
    "--save-interval", 3, "--eval-iters", 1, "--lr-warmup-iters", 2, "--draft-vocab-size", 64,
    "--eval-prompts", 1, "--eval-output-len", 8,
)  # fmt: skip


def conversations(path, count=120):
    """Questions and answers of different lengths, one or two turns."""
    lines = []
    for i in range(count):
        turns = [
            {"role": "user", "content": f"What is {i} plus {i + 1}?"},
            {"role": "assistant", "content": f"It is {2 * i + 1}." + " Sure." * (i % 4)},
        ]
        if i % 3 == 0:
            turns += [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Sum."}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")


def model_of(folder):
    return ("--pretrained-model-path", folder / "hf")


def data_of(folder):
    return ("--finetune-data-files", folder / "chat.jsonl")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Every run that the tests look at: one set of processes for each layout."""
    folder = tmp_path_factory.mktemp("eagle3")
    tools.random_model(folder / "hf", "qwen3", num_hidden_layers=4)
    conversations(folder / "chat.jsonl")
    online = (*model_of(folder), *data_of(folder), *STEPS)
    features = folder / "features"
    draft = ("--draft-vocab-size", 64)
    tools.run_stages(
        ("eagle3", (*online, "--save", folder / "TP=1")),
        ("extract_features",
         (*model_of(folder), *data_of(folder), "--fp32", "--seq-length", 128, *draft,
          "--num-samples", 10000, "--output-dir", features, "--shard-size", 8,
          "--micro-batch-size", 2)),
        ("eagle3", (*model_of(folder), *STEPS, "--offline-distillation-data", features,
                    "--save", folder / "offline")),
        ("convert", (*model_of(folder), "--fp32", "--algorithm", "eagle3", "--save",
                     folder / "drafted")),
        ("quantize", (*model_of(folder), "--fp32", "--save", folder / "fp8", "--skip-generate",
                      "--calib-dataset-path-or-name", folder / "chat.jsonl", "--calib-size", 2,
                      "--calib-max-sequence-length", 64)),
        ("eagle3", ("--load", folder / "fp8", *data_of(folder), *STEPS, "--train-iters", 3,
                    "--eval-iters", 0, "--save", folder / "fp8-eagle3")),
        ("convert", ("--load", folder / "fp8", "--fp32", "--algorithm", "eagle3",
                     "--draft-model-path", folder / "TP=1", "--save", folder / "joined")),
        ("eagle_parity", ("--load", folder / "drafted", "--fp32", "--output",
                          folder / "parity.json")),
    )  # fmt: skip
    for layout, (processes, flags) in LAYOUTS.items():
        done = tools.run_stages(
            ("eagle3", (*online, "--save", folder / layout, *flags)), processes=processes
        )
        # megatron-core compares what every rank saves.
        assert "Mismatched keys: [(" not in done.stdout + done.stderr
    return folder


def lines(folder, name):
    """The metrics of a run without what describes the machine."""
    return [
        {key: value for key, value in line.items() if key not in training_metrics.MACHINE}
        for line in training_metrics.read(folder / name / run_folder.FOLDER)
    ]


def test_the_loss_and_its_gradients_are_modelopts(work):
    found = json.loads((work / "parity.json").read_text())
    assert found["loss"] == pytest.approx(found["modelopt"], rel=1e-5)
    assert found["gradients"] < 1e-4


def test_chunks_change_nothing_and_memory_grows_with_the_length_alone(work):
    found = json.loads((work / "parity.json").read_text())
    assert found["chunked"] == pytest.approx(found["loss"], rel=1e-6)
    assert found["chunked_gradients"] < 1e-5
    for name in ("saved_bytes", "chunked_saved_bytes"):
        first, second, third = found[name]
        # A mask or scores of [s, s] kept for the backward pass would quadruple the difference.
        assert (third - second) / (second - first) < 2.2, name


def test_mixed_hidden_states_train_too(work):
    found = json.loads((work / "parity.json").read_text())
    assert found["mixed"] > 0 and found["mixed_is_finite"]


def test_training_lowers_the_loss_of_every_step(work):
    logged = [line for line in lines(work, "TP=1") if line["kind"] == "train"]
    assert [line["iteration"] for line in logged] == [2, 4, 6, 8]
    for step in (1, 2, 3):
        assert logged[-1][f"loss_{step}"] < logged[0][f"loss_{step}"]
    assert logged[-1]["lr"] < 2e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_alike(work, layout):
    """Relative tolerance 1e-5 in float32 over 8 iterations; PP computes in the same order."""
    expected, found = lines(work, "TP=1"), lines(work, layout)
    assert len(found) == len(expected)
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"kind"}:
            assert other[name] == pytest.approx(one[name], rel=1e-5, abs=1e-12), name
    if layout == "PP=2":
        assert found == expected


def test_stored_features_train_as_the_running_target_does(work):
    """The same losses to the last bit."""
    expected, found = lines(work, "TP=1"), lines(work, "offline")
    assert found == expected


def test_only_the_draft_was_trained_and_the_record_says_so(work):
    content = manifest.read(work / "TP=1")
    assert content["draft"]["trained"] == ITERATIONS
    assert content["draft"]["config"]["draft_vocab_size"] == 64
    assert not manifest.damaged_outputs(work / "TP=1", content)
    before, after = tensors(work / "drafted" / "release"), tensors(newest(work / "TP=1"))
    shared = [n for n in before if not n.startswith(("eagle_module.", "optimizer"))]
    assert shared
    for name in shared:
        assert (before[name] == after[name]).all(), name


def test_the_draft_vocabulary_is_that_of_the_answers(work):
    d2t = tensors(newest(work / "TP=1"))["eagle_module.d2t"]
    tokens = set((d2t + range_like(d2t)).tolist())
    assert len(tokens) == 64
    answers = "It is 0123456789. Sure. Sum."
    assert set(tools.chat_tokenizer()(answers)["input_ids"]) <= tokens


def test_a_quantized_target_keeps_its_scales_and_gets_a_draft(work):
    content = manifest.read(work / "fp8-eagle3")
    assert content["quantization"]["format"] == "FP8_DEFAULT_CFG"
    assert content["draft"]["trained"] == 3
    before, after = tensors(work / "fp8" / "release"), tensors(newest(work / "fp8-eagle3"))
    scales = [name for name in before if name.endswith("_amax")]
    assert scales
    assert all((before[name] == after[name]).all() for name in scales)
    assert not any("eagle_module" in name for name in after if name.endswith("_amax"))


def test_a_draft_of_the_unquantized_target_goes_to_the_quantized_one(work):
    import torch

    trained, joined = tensors(newest(work / "TP=1")), tensors(work / "joined" / "release")
    names = [name for name in trained if name.startswith("eagle_module.")]
    assert len(names) > 8
    for name in names:
        # ModelOpt saves the MLP of a quantized model in halves.
        halves = [joined[f"{name}_{half}"] for half in "wv" if f"{name}_{half}" in joined]
        found = torch.cat(halves, dim=1) if halves else joined[name]
        assert torch.equal(found, trained[name]), name
    content = manifest.read(work / "joined")
    assert content["draft"]["trained"] == ITERATIONS
    assert content["quantization"]["format"] == "FP8_DEFAULT_CFG"


def test_a_run_leaves_curves_and_tensorboard_files(work):
    folder = work / "TP=1" / "training"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").glob("events.*"))
    assert len(list((work / "TP=1").glob("iter_*"))) == 2


def test_an_interrupted_run_writes_the_same_losses(work):
    """Ended by SIGTERM, then killed, then run to the end: as if nothing had happened."""
    target = work / "interrupted"
    words = (*model_of(work), *data_of(work), *STEPS, "--save", target)

    def start():
        return subprocess.Popen(
            tools.command("eagle3.py", *words), cwd=tools.ROOT, env=tools.environment(),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def wait_for(process, iteration):
        end = time.monotonic() + 240
        while not any(line["iteration"] >= iteration for line in lines(work, "interrupted")):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < end
            time.sleep(0.002)

    process = start()
    wait_for(process, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=speed.scaled(120))
    assert process.returncode == EXIT_UNFINISHED, output
    assert "the same command resumes" in output
    stopped = run_folder.last_iteration(target)
    assert 2 <= stopped < ITERATIONS

    process = start()
    wait_for(process, min(stopped + 2, ITERATIONS) // 2 * 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()

    output = tools.run("eagle3.py", *words).stderr
    assert "resuming after iteration" in output
    assert lines(work, "interrupted") == lines(work, "TP=1")
    ours, theirs = tensors(newest(target)), tensors(newest(work / "TP=1"))
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] == theirs[name]).all(), name


def test_features_say_what_they_are_of(work):
    recorded = manifest.read(work / "features")["features"]
    assert recorded["sequence_length"] == 128
    assert {entry["file"].split("/")[0] for entry in recorded["shards"]} == {
        "train", "valid", "test",
    }  # fmt: skip
    parts = draft_features.find(work / "features").parts()
    assert parts["train"].batch([0])["aux_hidden_states"].shape == (1, 128, 3 * 128)
    assert not list((work / "features").rglob("*.incomplete"))


REFUSED = {
    "features of another model": (
        ("--offline-distillation-data", "{work}/features", "--eagle-config", "{tmp}/layers.json"),
        ("aux_hidden_state_layer_ids", "extract them"),
    ),
    "no features": (("--offline-distillation-data", "{work}/hf"), ("holds no features",)),
    "another length": (
        ("--offline-distillation-data", "{work}/features", "--seq-length", 64),
        ("--seq-length 64", "--seq-length 128"),
    ),
    "missing data": (("--finetune-data-files", "{tmp}/none.jsonl"), ("none.jsonl", "no such")),
    "not JSON": (("--finetune-data-files", "{tmp}/broken.jsonl"), ("line 2", "not JSON")),
    "no known field": (("--finetune-data-files", "{tmp}/fields.jsonl"), ("line 1", "prompt_text")),
    "role": (("--finetune-data-files", "{tmp}/role.jsonl"), ("line 1", "assistent", "assistant")),
    "no answer": (("--finetune-data-files", "{tmp}/empty.jsonl"), ("line 1", "mask is empty")),
    "plain text": (("--finetune-data-files", "{tmp}/text.jsonl"), ("line 1", "plain text")),
    "batch": (
        ("--global-batch-size", 3, "--micro-batch-size", 2),
        ("--global-batch-size 3", "multiple of 2"),
    ),
    "rates": (("--lr", 1e-9), ("--lr 1e-09", "--min-lr")),
    "two units": (("--train-iters", 5, "--train-samples", 5), ("two units",)),
    "too long": (("--seq-length", 512), ("--seq-length 512", "--seq-length 256")),
    "context parallel": (("--context-parallel-size", 2), ("CP=2",)),
    "another draft": (
        ("--save", "{work}/TP=1", "--draft-vocab-size", 32),
        ("--draft-vocab-size 32", "made with 64"),
    ),
    "occupied": (("--save", "{work}/hf"), ("holds no training run",)),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_end_with_exit_code_2_and_one_message(work, tmp_path, case):
    given, hints = REFUSED[case]
    turn = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    (tmp_path / "broken.jsonl").write_text(turn + "\n{\n")
    (tmp_path / "fields.jsonl").write_text('{"prompt_text": "a"}')
    (tmp_path / "role.jsonl").write_text('{"messages": [{"role": "assistent", "content": "a"}]}')
    (tmp_path / "empty.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    (tmp_path / "text.jsonl").write_text('{"text": "a"}')
    (tmp_path / "layers.json").write_text('{"eagle_aux_hidden_state_layer_ids": [0, 1, 3]}')
    words = [str(word).format(work=work, tmp=tmp_path) for word in given]
    if "--offline-distillation-data" not in words and "--finetune-data-files" not in words:
        words += map(str, data_of(work))
    if "--save" not in words:
        words += ["--save", str(tmp_path / "new")]
    done = tools.run("eagle3.py", *model_of(work), "--fp32", *words, code=2)
    for hint in hints:
        assert hint in done.stderr
    assert "Traceback" not in done.stderr and "remedy:" in done.stderr


@pytest.mark.parametrize("stage", ["eagle3", "extract_features"])
def test_a_refusal_takes_less_than_a_second_and_no_torch(work, tmp_path, stage):
    (tmp_path / "broken.jsonl").write_text("{")
    words = [*model_of(work), "--finetune-data-files", tmp_path / "broken.jsonl"]
    words += ["--save" if stage == "eagle3" else "--output-dir", tmp_path / "new"]
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        tools.run(f"{stage}.py", *words, code=2)
        seconds.append(time.monotonic() - started)
    assert min(seconds) < speed.scaled(1)
    command = [sys.executable, "-X", "importtime", tools.ROOT / f"{stage}.py", *map(str, words)]
    done = subprocess.run(command, env=tools.environment(), capture_output=True, text=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not {"torch", "megatron.core", "modelopt"} & imported


def tensors(folder):
    """Every tensor of one iteration by its name."""
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(folder))
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


def newest(folder):
    return folder / f"iter_{run_folder.last_iteration(folder):07d}"


def range_like(tensor):
    import torch

    return torch.arange(len(tensor))


def test_a_draft_is_trained_in_the_precision_it_was_made_in(work, tmp_path):
    words = ("--load", work / "drafted", *data_of(work), "--save", tmp_path / "new", "--bf16")
    done = tools.run("eagle3.py", *words, "--check", code=2)
    assert "its draft was made in float32" in done.stderr
    assert "add --fp32" in done.stderr
