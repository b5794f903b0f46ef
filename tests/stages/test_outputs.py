"""Outputs: one run at a time makes one, --overwrite replaces its like only, inputs are safe."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time

import pytest
import speed
import tools
import torch
from questions import write_questions

from post_training.common import files, locks, manifest


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    tools.random_model(folder / "model", "qwen3", torch.bfloat16, num_hidden_layers=2)
    tools.run("convert.py", "--pretrained-model-path", folder / "model", "--save", folder / "mlm")
    tools.write_conversations(folder / "chat.jsonl", 12)
    tools.write_texts(folder / "text.jsonl")
    (folder / "questions").mkdir()
    write_questions(folder / "questions")
    return folder


def words(work, stage, output):
    load = ("--load", work / "mlm")
    return {
        "convert": (*load, "--save", output),
        "quantize": (
            *load, "--save", output, "--calib-size", 2, "--calib-max-sequence-length", 64,
            "--calib-dataset-path-or-name", work / "text.jsonl", "--skip-generate",
        ),
        "distill": (
            *load, "--teacher", work / "model", "--save", output, "--train-iters", 2,
            "--finetune-data-files", work / "text.jsonl", "--seq-length", 64, "--eval-iters", 0,
        ),
        "eagle3": (
            *load, "--save", output, "--train-iters", 2, "--seq-length", 64, "--eval-iters", 0,
            "--finetune-data-files", work / "chat.jsonl",
        ),
        "export": (*load, "--export-dir", output),
        "extract_features": (
            *load, "--output-dir", output, "--finetune-data-files", work / "chat.jsonl",
            "--seq-length", 64, "--num-samples", 8,
        ),
        "generate": (*load, "--prompts-path", work / "chat.jsonl", "--output", output,
                     "--max-new-tokens", 4),
        "mmlu": (*load, "--mmlu-dataset", work / "questions", "--mmlu-output", output),
    }[stage]  # fmt: skip


FOLDERS = ("convert", "quantize", "distill", "eagle3", "export", "extract_features")


@pytest.mark.parametrize("stage", FOLDERS)
@pytest.mark.parametrize("holds", ["a model", "notes", "another kind"])
def test_overwrite_replaces_no_other_thing(work, tmp_path, stage, holds):
    output = tmp_path / "output"
    if holds == "a model":
        shutil.copytree(work / "model", output)
    elif holds == "notes":
        output.mkdir()
        (output / "notes.txt").write_text("mine")
    elif stage == "export":
        shutil.copytree(work / "mlm", output)
    else:
        shutil.copytree(work / "model", output)
        (output / "run.json").write_text(json.dumps({"format": 1, "stage": "export"}))
    before = files.describe_tree(output)
    done = tools.run(f"{stage}.py", *words(work, stage, output), "--overwrite", "--check", code=2)
    assert f"output folder {output}" in done.stderr and "what this stage makes" in done.stderr
    assert files.describe_tree(output) == before


@pytest.mark.parametrize("stage", FOLDERS)
def test_an_output_that_is_an_input_or_holds_one_is_refused(work, tmp_path, stage):
    shutil.copytree(work / "mlm", tmp_path / "all" / "mlm")
    for output in (tmp_path / "all" / "mlm", tmp_path / "all"):
        given = [tmp_path / "all" / "mlm" if w == work / "mlm" else w for w in
                 words(work, stage, output)]  # fmt: skip
        done = tools.run(f"{stage}.py", *given, "--overwrite", "--check", code=2)
        assert "input" in done.stderr or "what this stage makes" in done.stderr
    assert (tmp_path / "all" / "mlm" / manifest.FILE).exists()


@pytest.mark.parametrize("stage", ["convert", "mmlu", "generate"])
def test_a_symbolic_link_is_not_replaced(work, tmp_path, stage):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "there" if stage == "convert" else tmp_path / "none")
    given = (*words(work, stage, tmp_path / "link"), "--check")
    done = tools.run(f"{stage}.py", *given, code=2)
    assert f"symbolic link to {tmp_path}" in done.stderr


def test_closed_standard_streams_are_no_places_for_output(work, tmp_path):
    """Files that a stage opens would get their numbers, and what libraries print."""
    line = tools.command("convert.py", *words(work, "convert", tmp_path / "mlm"))
    closed = f"exec {shlex.join(line)} <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", closed], env=tools.environment()).returncode == 0
    assert manifest.read(tmp_path / "mlm")["stage"] == "convert"


@pytest.mark.parametrize("stage", ["mmlu", "generate"])
def test_a_file_that_no_run_of_the_stage_made_is_not_replaced(work, tmp_path, stage):
    path = tmp_path / "mine.json"
    path.write_text('{"stage": "validate"}')
    given = (*words(work, stage, path), "--overwrite", "--check")
    done = tools.run(f"{stage}.py", *given, code=2)
    assert str(path) in done.stderr and "it exists, and" in done.stderr
    assert path.read_text() == '{"stage": "validate"}'


def test_the_prompts_are_no_output(work, tmp_path):
    prompts = tools.write_conversations(tmp_path / "chat.jsonl", 2)
    given = ("--load", work / "mlm", "--prompts-path", prompts, "--output", prompts)
    done = tools.run("generate.py", *given, "--overwrite", "--check", code=2)
    assert str(prompts) in done.stderr
    assert prompts.stat().st_size > 100


def test_training_over_another_run_takes_the_new_models_files(work, tmp_path):
    """The tokenizer of the run before stayed; what it had is there until the first save."""
    output = tmp_path / "run"
    tools.run("distill.py", *words(work, "distill", output))
    (output / "huggingface" / "tokenizer_config.json").write_text('{"of": "the run before"}')
    (output / "iter_0000002" / "old").write_text("")
    tools.run("distill.py", *words(work, "distill", output), "--overwrite")
    assert "the run before" not in (output / "huggingface" / "tokenizer_config.json").read_text()
    assert not (output / "iter_0000002" / "old").exists()
    assert not output.with_name(".run.previous").exists()


def test_of_two_runs_with_one_output_the_second_is_refused(work, tmp_path):
    output = tmp_path / "answers.jsonl"
    given = (*words(work, "generate", output), "--max-new-tokens", 400)
    first = subprocess.Popen(
        tools.command("generate.py", *given),
        cwd=tools.ROOT,
        env=tools.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + speed.scaled(120)
    while not files.sibling(output, ".lock").exists():
        assert first.poll() is None, first.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)
    done = tools.run("generate.py", *given, code=2)
    assert f"process {first.pid} on" in done.stderr and str(output) in done.stderr
    assert first.wait(speed.scaled(300)) == 0
    assert len(output.read_text().splitlines()) == 12
    locks.check(output)
    assert not files.sibling(output, ".lock").exists()


def test_an_output_that_another_run_has_made_since_the_check_is_not_replaced(work, tmp_path):
    """Both runs found the place free; the second gets the lock when the first is done with it."""
    output = tmp_path / "output"
    program = tmp_path / "program.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(tools.ROOT)!r})\n"
        "import export\n"
        "from pathlib import Path\n"
        "from post_training.cli import stage\n"
        "open_session = stage.open_session\n"
        "def late(options):\n"
        "    Path(options.export_dir).mkdir()  # what another run does meanwhile\n"
        "    return open_session(options)\n"
        "stage.open_session = late\n"
        "export.main()\n"
    )
    done = tools.run(str(program), *words(work, "export", output), code=2)
    assert f"output {output}" in done.stderr and "another run has just made it" in done.stderr
    assert list(output.iterdir()) == []


def test_a_disk_that_becomes_full_is_named_and_a_larger_one_is_enough(work, tmp_path):
    """The room that is asked for is there when the run starts, and taken before it saves."""
    disk, size = tmp_path / "disk", 30 * files.size_of(work / "mlm")
    disk.mkdir()
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f'mount -t tmpfs -o size={size} tmpfs "$0" && "$@"'
    if subprocess.run([*mounted, mount, disk, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    fill = f'until [ -d "$0/run" ]; do sleep 0.05; done; head -c {size} /dev/zero >"$0/other"'
    mount = mount.replace(
        '"$@"', f'{{ ({fill}) 2>"$0.full" & "$@"; code=$?; kill $! 2>/dev/null; exit $code; }}'
    )
    given = words(work, "distill", disk / "run")
    done = subprocess.run(
        [*mounted, mount, str(disk), *tools.command("distill.py", *given)],
        cwd=tools.ROOT,
        env=tools.environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert f"error: output {disk / 'run'}\n  cause: a disk became full" in done.stderr
    assert "Traceback" not in done.stderr
    tools.run("distill.py", *given)
