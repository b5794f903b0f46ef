"""The parts of the training loop that need no model: order, options, metrics, signals."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.distributed.checkpoint

import extract_features
from post_training.checkpoints import torch_dist
from post_training.checkpoints.unpickling import only_known_classes
from post_training.common import files, manifest
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.config.flags import group
from post_training.config.options import StageOptions
from post_training.distributed import signals
from post_training.drafts import extraction, features
from post_training.training import metrics as training_metrics
from post_training.training import options as training_options
from post_training.training import run_folder
from post_training.training.options import TrainingFlags, TrainingOptions
from post_training.training.sampler import Order, micro_batches


@dataclass(frozen=True, kw_only=True)
class Options(StageOptions):
    DEFAULTS: ClassVar[dict[str, int]] = {"train_samples": 128000}

    training: TrainingFlags = group(TrainingFlags)


def options(*words: object) -> TrainingOptions:
    found = arguments.parse("eagle3", Options, [str(word) for word in words])
    return training_options.decide(found.training, found, found.seq_length or 2048)


class Numbers:
    """Samples that are their own indices."""

    def __len__(self):
        return 10

    def batch(self, indices):
        return {"n": torch.tensor(indices)}


def batches(start: int, ranks: int, micro: int, count: int) -> list[list[int]]:
    """Sample numbers of each iteration of 4, whatever the ranks."""
    iterations = [[] for _ in range(count)]
    for rank in range(ranks):
        made = micro_batches(Numbers(), Order(10, seed=5), start=start, micro_batch=micro,
                             rank=rank, ranks=ranks, device=torch.device("cpu"))  # fmt: skip
        for iteration in iterations:
            for _ in range(4 // (micro * ranks)):
                iteration += next(made)["n"].tolist()
    return [sorted(iteration) for iteration in iterations]


def test_an_epoch_has_every_sample_once_and_the_next_another_order():
    order = Order(10, seed=5)
    epochs = [[order[10 * e + i] for i in range(10)] for e in range(2)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert [Order(10, seed=5)[13]] == [epochs[1][3]]


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 1)])
def test_ranks_and_micro_batches_do_not_change_what_an_iteration_sees(ranks, micro):
    assert batches(0, ranks, micro, 5) == batches(0, 1, 2, 5)


def test_a_run_resumes_where_it_stopped():
    assert batches(8, 1, 2, 3) == batches(0, 1, 2, 5)[2:]


def test_the_defaults_are_the_originals():
    found = options()
    assert found.train_iters == 128000
    assert (found.lr, found.min_lr, found.lr_decay_style) == (5e-5, 1e-7, "cosine")
    assert (found.adam_beta1, found.adam_beta2, found.clip_grad) == (0.9, 0.95, 1.0)
    assert (found.save_interval, found.eval_interval, found.log_interval) == (1000, 1000, 100)
    assert (found.micro_batch_size, found.lr_warmup_iters) == (1, 0)


def test_samples_and_fractions_become_iterations():
    found = options("--train-samples", 100, "--global-batch-size", 8, "--lr-warmup-fraction", 0.25)
    assert (found.train_iters, found.lr_warmup_iters) == (13, 3)
    assert options("--train-iters", 7, "--lr-warmup-samples", 3).lr_warmup_iters == 3


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (("--train-iters", 0), "--train-iters 0"),
        (("--global-batch-size", 3, "--micro-batch-size", 2), "--global-batch-size 3"),
        (("--lr", 1e-8), "--lr 1e-08"),
        (("--adam-beta2", 1.0), "--adam-beta2 1.0"),
        (("--train-iters", 5, "--lr-warmup-iters", 5), "warm-up of 5"),
        (("--lr-warmup-iters", 5, "--lr-warmup-fraction", 0.1), "--lr-warmup-iters"),
        (("--fp16",), "--fp16"),
        (("--seq-length", 4), "--seq-length 4"),
        (("--save-interval", 0), "--save-interval 0"),
        (("--lr", "nan"), "--lr nan"),
        (("--weight-decay", "inf"), "--weight-decay inf"),
        (("--lr-warmup-fraction", 2), "--lr-warmup-fraction 2"),
        (
            (
                "--tensor-model-parallel-size",
                2,
                "--sequence-parallel",
                "--seq-length",
                33,
                "--check",
            ),
            "TP=2 does not divide",
        ),
    ],
)
def test_options_that_cannot_work_are_refused(words, what):
    with pytest.raises(UsageError) as caught:
        options(*words)
    assert what in str(caught.value)


def test_metrics_after_the_checkpoint_are_written_again(tmp_path):
    metrics = training_metrics.Metrics(tmp_path, 0, 10)
    for iteration in range(1, 6):
        metrics.log("train", iteration, iteration, {"loss": 1.0 / iteration, "loss_1": 0.5})
    metrics.close()
    with (tmp_path / training_metrics.FILE).open("a") as stream:
        stream.write('{"kind": "train", "iterat')  # killed while it wrote
    metrics = training_metrics.Metrics(tmp_path, 3, 10)
    metrics.log("train", 4, 4, {"loss": 9.0})
    metrics.close()
    found = training_metrics.read(tmp_path)
    assert [line["iteration"] for line in found] == [1, 2, 3, 4]
    assert found[-1]["loss"] == 9.0
    assert (tmp_path / training_metrics.CURVES).stat().st_size > 1000


def test_a_deferred_signal_is_noted_and_ends_nothing():
    with signals.prompt_exit(), signals.deferred():
        assert not signals.asked_to_end()
        # In either order: what is deferred outside is no reason to end inside.
        with signals.prompt_exit(), signals.deferred():
            for number in signals.TIME_LIMIT:
                os.kill(os.getpid(), number)
        assert signals.asked_to_end()
    assert not signals.asked_to_end()
    with pytest.raises(signals.Interrupted), signals.prompt_exit():
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()


def test_a_signal_during_a_destructor_is_not_lost(capfd):
    """Python reports an exception there, and goes on."""

    class Last:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000):  # where the handler runs
                pass

    with pytest.raises(signals.Interrupted), signals.prompt_exit() as imported:
        imported()
        Last()
        time.sleep(2)
        pytest.fail("the signal is lost")
    assert "Traceback" not in capfd.readouterr().err


def test_a_signal_ends_a_process_at_once_until_its_imports_are_done():
    """torch's run Python inside C++ code, which aborts on an exception."""
    ended = []

    def end(error):
        ended.append(error.number)
        raise error

    with pytest.raises(signals.Interrupted), signals.prompt_exit(end):
        with contextlib.suppress(signals.Interrupted):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        assert ended == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGINT)  # ignored: the process is about to end
        raise signals.Interrupted(signal.SIGTERM)
    ended.clear()
    with pytest.raises(signals.Interrupted), signals.prompt_exit(end) as imported:
        imported()
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            assert not ended  # what the block has to undo comes first
    assert ended == [signal.SIGTERM]


def test_a_signal_during_a_load_is_no_fault_of_the_checkpoint(tmp_path):
    """torch wraps what ends a read, and sends it to the other ranks."""
    torch.distributed.checkpoint.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path)

    class Planner(torch.distributed.checkpoint.DefaultLoadPlanner):
        def create_local_plan(self):
            raise signals.Interrupted(signal.SIGINT)

    with pytest.raises(signals.Interrupted, match="SIGINT"), only_known_classes("checkpoint"):
        state = {"weight": torch.zeros(2)}
        torch.distributed.checkpoint.load(state, checkpoint_id=tmp_path, planner=Planner())
    sent = pickle.loads(pickle.dumps(signals.Interrupted(signal.SIGTERM)))
    assert (sent.number, str(sent)) == (signal.SIGTERM, "SIGTERM")


def test_a_run_is_resumed_with_the_model_it_started_from(tmp_path, monkeypatch):
    run, model, other = (tmp_path / name for name in ("run", "model", "other"))
    for folder in (run, model, other):
        folder.mkdir()
    for folder in (model, other):
        (folder / manifest.FILE).write_text(json.dumps({"command": folder.name}))
    content = {"stage": "eagle3", "inputs": [manifest.describe_input("model", model)]}
    (run / manifest.FILE).write_text(json.dumps({**content, "slurm_job": "7"}))
    (run / torch_dist.TRACKER).write_text("3")
    check = run_folder.check_folder
    check(run, "eagle3", model=str(model))
    with pytest.raises(UsageError, match="began with another model"):
        check(run, "eagle3", model=str(other))
    check(run, "eagle3", overwrite=True, model=str(other))
    # A job that is queued again keeps its command line: --overwrite was meant for its first start.
    assert not run_folder.resumes(run, overwrite=True)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not run_folder.resumes(run, overwrite=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run_folder.resumes(run, overwrite=True)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    assert not run_folder.resumes(run, overwrite=True)


def test_a_folder_is_free_or_holds_a_run_to_resume(tmp_path):
    run_folder.check_folder(tmp_path / "new", "eagle3")
    run = tmp_path / "run"
    (run / "training").mkdir(parents=True)
    run_folder.check_folder(run, "eagle3")  # killed before its first checkpoint
    (run / torch_dist.TRACKER).write_text("12")
    (run / "run.json").write_text(json.dumps({"stage": "distill"}))
    assert run_folder.last_iteration(run) == 12
    run_folder.check_folder(run, "distill")
    with pytest.raises(UsageError, match="distill"):
        run_folder.check_folder(run, "eagle3")
    other = tmp_path / "other"
    other.mkdir()
    files.write_text(other / "thesis.txt", "years of work")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        run_folder.check_folder(other, "eagle3")


def test_what_a_resumed_run_reads_beside_what_it_read_before_is_recorded(caplog):
    before = [
        {"role": "model", "path": "/m", "manifest_sha256": "1"},
        {"role": "data", "path": "/d", "sha256": "2"},
        {"role": "data", "path": "org/set"},
    ]
    moved = {"role": "data", "path": "/elsewhere", "sha256": "2"}
    assert run_folder.inputs_of_all(before, [moved, before[2]]) == before
    changed = {"role": "data", "path": "/d", "sha256": "3"}
    with caplog.at_level("WARNING", "post_training"):
        assert run_folder.inputs_of_all(before, [changed]) == [*before, changed]
    assert "data /d is not what the run read before" in caplog.text


def test_an_extraction_is_resumed_with_the_data_it_began_with(tmp_path):
    for _ in range(2):
        extraction.begin(tmp_path, {"aux_hidden_state_layer_ids": [1]}, overwrite=False)
        extraction.require_same_data(tmp_path, "0a")
    with pytest.raises(UsageError, match="the tokenizer, was changed since the extraction"):
        extraction.require_same_data(tmp_path, "0b")
    for name in (f"{extract_features.DATA}/0a/train_ids.npy", "train/shard-00000.safetensors"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    features.check_folder(tmp_path, None, overwrite=True)
