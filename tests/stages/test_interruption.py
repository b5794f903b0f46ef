"""A stage killed at any moment loses nothing, and Ctrl-C ends every rank."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import speed
import tools
import torch

from post_training.common import files, manifest


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    tools.random_model(folder, "qwen3", torch.bfloat16)
    return folder


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "megatron"
    tools.run("convert.py", "--pretrained-model-path", source, "--save", folder)
    return folder


def start(*words: object, processes: int = 1) -> subprocess.Popen:
    return subprocess.Popen(
        tools.command(*words, processes=processes),
        cwd=tools.ROOT,
        env=tools.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def kill_group(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(path, process, seconds=120):
    """Wait until ``path`` exists while ``process`` runs."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize(
    ("stage", "source_flag", "target_flag"),
    [
        ("convert.py", "--load", "--save"),
        ("export.py", "--load", "--export-dir"),
    ],
)
def test_kill_while_writing_keeps_the_previous_output(
    checkpoint, stage, source_flag, target_flag, tmp_path
):
    target = tmp_path / "target"
    flags = (source_flag, checkpoint, target_flag, target)
    tools.run(stage, *flags)
    before = files.describe_tree(target)

    process = start(stage, *flags, "--overwrite")
    wait_for(files.incomplete(target), process)
    kill_group(process)
    assert files.describe_tree(target) == before
    assert not manifest.damaged_outputs(target, manifest.read(target))

    tools.run(stage, *flags, "--overwrite")
    assert not files.incomplete(target).exists()
    assert not manifest.damaged_outputs(target, manifest.read(target))


@pytest.mark.parametrize(
    ("stage", "target_flag"), [("convert.py", "--save"), ("export.py", "--export-dir")]
)
def test_kill_during_the_first_output_leaves_no_final_name(
    checkpoint, stage, target_flag, tmp_path
):
    target = tmp_path / "target"
    process = start(stage, "--load", checkpoint, target_flag, target)
    wait_for(files.incomplete(target), process)
    kill_group(process)
    assert not target.exists()
    tools.run(stage, "--load", checkpoint, target_flag, target)
    assert not manifest.damaged_outputs(target, manifest.read(target))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_kill_of_the_first_process_leaves_none(checkpoint, tmp_path, processes):
    """As the kernel does where memory is short: it kills one process, not the group."""
    sizes = ("--tensor-model-parallel-size", 2) if processes == 2 else ()
    target = tmp_path / "target"
    process = start(
        "convert.py", "--load", checkpoint, "--save", target, *sizes, processes=processes
    )
    wait_for(files.incomplete(target), process)
    process.kill()
    process.wait()
    assert has_ended(process.pid)


def has_ended(group: int, seconds: float = 10) -> bool:
    """Whether no process of the group is left, or will be within so many seconds."""
    end = time.monotonic() + speed.scaled(seconds)
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def test_a_kill_between_the_two_renames_is_undone(tmp_path):
    """In between, the previous output has another name."""
    target = tmp_path / "output"
    target.with_name(".output.previous").mkdir()
    (target.with_name(".output.previous") / "weights").write_text("old")
    assert files.recover(target)
    assert (target / "weights").read_text() == "old"
    assert not files.recover(target)


@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_ends_every_rank(source, tmp_path, processes):
    flags = ("--tensor-model-parallel-size", 2) if processes == 2 else ()
    target = tmp_path / "target"
    process = start(
        "convert.py", "--pretrained-model-path", source, "--save", target, *flags,
        processes=processes,
    )  # fmt: skip
    wait_for(files.sibling(target, ".lock"), process)  # the work begins
    # As a terminal does: the signal goes to every process of the foreground group.
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=speed.scaled(45))
    assert process.returncode != 0
    assert not target.exists()
    assert has_ended(process.pid)
    if processes == 1:
        assert process.returncode == 130
        assert "ended by SIGINT" in output
        assert "Traceback" not in output


@pytest.mark.parametrize(
    ("stage", "number"), [("eagle3", signal.SIGUSR1), ("distill", signal.SIGTERM)]
)
def test_a_signal_before_training_begins_ends_it_with_nothing_changed(
    stage, number, source, checkpoint, tmp_path
):
    """Sent while the stage imports its packages: it ends where it can, as if it had trained."""
    save, flags = tmp_path / "run", ("--load", checkpoint, "--train-iters", 2, "--seq-length", 64)
    if stage == "distill":
        flags += (
            "--teacher",
            source,
            "--finetune-data-files",
            tools.write_texts(tmp_path / "text.jsonl"),
        )
    else:
        flags += ("--finetune-data-files", tools.write_conversations(tmp_path / "chat.jsonl"))
    process = start(f"{stage}.py", *flags, "--save", save)
    status = Path(f"/proc/{process.pid}/status")
    while not handles(number, status.read_text()):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(number)
    output = process.communicate(timeout=speed.scaled(120))[0]
    assert process.returncode == 75, output
    assert "asked to end before its training began" in output
    assert not save.exists()


def handles(number: int, status: str) -> bool:
    """Whether a process has a handler for a signal, from its /proc/<pid>/status."""
    caught = int(re.search(r"^SigCgt:\s*(\w+)", status, re.MULTILINE)[1], 16)
    return bool(caught >> (number - 1) & 1)
