"""Files that several packages read: JSON, safetensors headers; and third parties kept quiet."""

from __future__ import annotations

import json
import logging
import os
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from model_folders import write_model

import generate
import mmlu
from post_training.checkpoints.source import Source
from post_training.cli.stage import make_plan
from post_training.common import (
    files,
    forms,
    hashing,
    locks,
    manifest,
    outputs,
    regular,
    resumable_jsonl,
    safetensors_index,
    validity,
)
from post_training.common.errors import UsageError
from post_training.common.quiet import quiet
from post_training.data import records
from post_training.drafts import features
from post_training.inference import generate_options
from post_training.training import run_folder


def test_a_missing_json_file_is_none_where_it_may_be_missing(tmp_path):
    assert files.read_json(tmp_path / "a.json") is None
    with pytest.raises(UsageError, match=r"a\.json\n  cause: there is no such file"):
        files.read_json_object(tmp_path / "a.json")


@pytest.mark.parametrize("text", ['{"a": ', b"\xff\xfe{}"])
def test_a_damaged_json_file_is_refused_with_what_it_is_and_the_remedy(text, tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    for read in (files.read_json, files.read_json_object):
        with pytest.raises(UsageError) as refused:
            read(path, "plan", "make it again")
        assert refused.value.what == f"plan {path}"
        assert "cannot be read as JSON" in refused.value.cause
        assert refused.value.remedy == "make it again"


def test_a_json_object_is_no_list(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    assert files.read_json(tmp_path / "a.json") == [1]
    with pytest.raises(UsageError, match="no JSON object"):
        files.read_json_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("dtype", "size"),
    [("BF16", 128), ("F8_E4M3", 64), ("F8_E8M0", 64), ("F4", 32), ("U8", 64), ("BOOL", 64),
     ("I64", 512), ("F32", 256)],
)  # fmt: skip
def test_a_header_gives_dtype_shape_and_bytes(dtype, size, tmp_path):
    header = {"t": {"dtype": dtype, "shape": [8, 8], "data_offsets": [0, size]}}
    write(tmp_path / "model.safetensors", header, size)
    (entry,) = safetensors_index.read(tmp_path).values()
    assert (entry.dtype, entry.shape, entry.numel, entry.bytes) == (dtype, (8, 8), 64, size)


def write(path, header, size):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + size)


@pytest.mark.parametrize(
    ("offsets", "size"),
    [([0, 100], 100), ([10, 138], 138), ([0, 128], 100), ([0, 128], 140)],
    ids=["fewer bytes than the shape", "a hole", "truncated", "longer than the header says"],
)
def test_a_header_that_contradicts_itself_or_the_file_is_refused(offsets, size, tmp_path):
    path = tmp_path / "model.safetensors"
    write(path, {"a": {"dtype": "BF16", "shape": [8, 8], "data_offsets": offsets}}, size)
    with pytest.raises(UsageError) as refused:
        safetensors_index.read(tmp_path)
    assert str(path) in refused.value.what
    assert f"{path.stat().st_size} bytes" in refused.value.cause


def test_an_index_that_names_a_tensor_its_files_lack_is_refused(tmp_path):
    folder = write_model(tmp_path, a=[4], b=[4])
    names = {"a": "model.safetensors", "c": "model.safetensors"}
    (folder / safetensors_index.INDEX).write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UsageError, match="names 1 tensors that its files lack"):
        safetensors_index.read(folder)


def test_the_current_folder_and_the_root_have_nothing_to_recover(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert not files.recover(Path())
    assert not files.recover(Path("/"))
    assert files.incomplete(Path()) == tmp_path / "model.incomplete"
    assert files.incomplete(Path("model")) == Path("model.incomplete")


def test_quiet_silences_what_is_named_and_nothing_else(capsys, caplog):
    loud, other = logging.getLogger("loud"), logging.getLogger("other")
    with (
        caplog.at_level(logging.DEBUG),
        quiet("loud", stdout=True, stderr=True, warning="known"),
    ):
        print("table")
        print("bar", file=sys.stderr)
        loud.warning("noise")
        loud.error("failure")
        other.warning("news")
        warnings.warn("known and harmless", stacklevel=1)
        with pytest.warns(UserWarning, match="unknown"):
            warnings.warn("unknown", stacklevel=1)
    assert capsys.readouterr() == ("", "")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["failure", "news", "printed: table"]
    loud.warning("heard again")
    assert "heard again" in caplog.text


def test_a_source_that_was_replaced_while_it_was_loaded_is_refused(tmp_path):
    source = Source(str(tmp_path), False, None, None)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(UsageError, match="replaced while it was loaded"):
        source.require_unchanged()
    again = Source(str(tmp_path), False, None, None)
    again.require_unchanged()
    assert again.inputs("teacher")[0]["role"] == "teacher"


def read_prompts(plan):
    recorded = generate_options.recorded_prompts(plan.settings)
    return generate_options.read_prompts(plan.options, recorded)


def test_what_is_recorded_of_questions_and_prompts_is_what_was_read(tmp_path):
    """Both are read long before or after the other inputs are described."""
    write_model(tmp_path / "model")
    given = ("--pretrained-model-path", tmp_path / "model")
    questions, prompts = tmp_path / "test.jsonl", tmp_path / "prompts.jsonl"
    row = '{"subject": "s", "question": "q", "choices": ["a", "b"], "answer": 0}\n'
    questions.write_text(row)
    prompts.write_text('{"prompt": "q"}\n')
    words = [*given, "--mmlu-dataset", questions, "--mmlu-output", tmp_path / "r.json", "--check"]
    asked = make_plan(mmlu.STAGE, [*map(str, words), "--few-shots", "0"])
    words = [*given, "--prompts-path", prompts, "--output", tmp_path / "a.jsonl", "--check"]
    generated = make_plan(generate.STAGE, list(map(str, words)))
    assert len(read_prompts(generated).dialogues) == 1
    before = files.sha256(questions)
    questions.write_text(row * 2)
    prompts.write_text('{"prompt": "another"}\n')
    assert asked.questions["sha256"] == before
    with pytest.raises(UsageError, match="replaced while it was read"):
        read_prompts(generated)


def test_rows_are_not_resumed_with_another_tokenizer(tmp_path):
    model, tokenizer = write_model(tmp_path / "model"), tmp_path / "tokenizer"
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "q"}\n')
    words = ["--pretrained-model-path", model, "--tokenizer-model", tokenizer, "--check"]
    words += ["--prompts-path", tmp_path / "prompts.jsonl", "--output", tmp_path / "a.jsonl"]
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    settings = make_plan(generate.STAGE, list(map(str, words))).settings
    resumable_jsonl.Rows(tmp_path / "a.jsonl", settings).append([{"id": 0}], done=1, totals={})
    make_plan(generate.STAGE, list(map(str, words)))
    (tokenizer / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UsageError, match="made otherwise: tokenizer was"):
        make_plan(generate.STAGE, list(map(str, words)))


@pytest.mark.parametrize("kind", ["xxh3_128", "sha256"])
def test_changed_files_are_those_with_other_contents_or_sizes_or_none(tmp_path, kind):
    for name in ("same", "flipped", "cut", "gone"):
        (tmp_path / name).write_bytes(name.encode() * 3_000_000)
    described = files.describe_tree(tmp_path)
    if kind == "sha256":
        described = [
            {"file": e["file"], "bytes": e["bytes"], "sha256": files.sha256(tmp_path / e["file"])}
            for e in described
        ]
    assert files.changed(tmp_path, described) == []
    data = bytearray((tmp_path / "flipped").read_bytes())
    data[-1] ^= 0x80
    (tmp_path / "flipped").write_bytes(data)
    (tmp_path / "cut").write_bytes(b"cut")
    (tmp_path / "gone").unlink()
    assert files.changed(tmp_path, described) == ["cut", "flipped", "gone"]


def test_a_file_that_is_hashed_ahead_is_described_as_it_is_then(tmp_path):
    first, second = tmp_path / "rank0.part", tmp_path / "model.part"
    for path in (first, second):
        path.write_bytes(os.urandom(1 << 20))
        hashing.describe_ahead(path)
    renamed = first.rename(tmp_path / "whole")
    assert hashing.describe(renamed) == hashing.describe(renamed)
    assert files.changed(tmp_path, [{"file": "whole", **hashing.describe(renamed)}]) == []
    second.write_bytes(b"something else")
    described = hashing.describe(second)
    assert described["bytes"] == 14
    assert files.changed(tmp_path, [{"file": "model.part", **described}]) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: mounting needs root")
def test_a_volume_is_emptied_and_other_folders_are_kept_until_they_are_replaced(tmp_path):
    for name in ("folder", "volume"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / name / "inner" / "file").write_text(name)
    files.set_aside(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    assert (tmp_path / ".folder.previous" / "inner" / "file").read_text() == "folder"
    files.drop_previous(tmp_path / "folder")
    assert not (tmp_path / ".folder.previous").exists()
    volume = tmp_path / "volume"
    subprocess.run(["mount", "--bind", volume, volume], check=True)
    try:
        files.set_aside(volume)
        assert list(volume.iterdir()) == []
    finally:
        subprocess.run(["umount", volume], check=True)


def test_a_small_file_that_cannot_be_written_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "report.json"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "a half of a surrogate pair: \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def special(path: Path, kind: str) -> Path:
    """What is no regular file and has its name, or one that nobody can hold in memory."""
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "a hole":
            path.touch()
            os.truncate(path, 1 << 42)
        case "folder":
            path.mkdir()
        case "link to nowhere":
            path.symlink_to(path.parent / "nowhere")
        case "link to itself":
            path.symlink_to(path.name)
    return path


SPECIAL = ("pipe", "device", "a hole", "folder", "link to nowhere", "link to itself")


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_is_refused_before_it_is_read(kind, tmp_path):
    """A pipe waits, a device never ends; a manifest that cannot be read is not a missing one."""
    special(tmp_path / manifest.FILE, kind)
    with pytest.raises(UsageError, match=manifest.FILE):
        manifest.read(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be read|bytes"):
        forms.read_yaml(tmp_path / manifest.FILE, "recipe", "write another")
    with pytest.raises((OSError, ValueError)):
        regular.read_text(tmp_path / manifest.FILE)


def test_data_without_an_end_of_line_are_not_read_to_their_end(tmp_path):
    for name in ("a.jsonl", "a.csv"):
        path = special(tmp_path / name, "a hole")
        with pytest.raises(UsageError, match="NUL"):
            next(records.read(path, "--data"))


def test_a_name_has_one_value(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"rope_theta": 1.0, "rope_theta": 2.0}')
    with pytest.raises(UsageError, match="'rope_theta' is there twice"):
        files.read_json(path)
    path.write_text("rope_theta: 1.0\nother: 3\nrope_theta: 2.0\n")
    with pytest.raises(UsageError, match="line 3: 'rope_theta' is there twice"):
        forms.read_yaml(path, "recipe", "write another")


def own_output(folder: Path, stage: str = "convert") -> Path:
    folder.mkdir()
    (folder / "weights").write_text("w")
    manifest.Manifest(stage, {}).write(folder)
    return folder


@pytest.mark.parametrize(
    "holds", ["notes.txt", ".env", "iter_notes", "training/notes.txt", "another output", "its own"]
)
@pytest.mark.parametrize("stage", ["convert", "distill"])
def test_what_someone_put_into_an_output_is_not_replaced_with_it(stage, holds, tmp_path):
    output = own_output(tmp_path / "run", stage)
    if holds == "another output":
        own_output(output / "quantized", "quantize")
    elif holds == "its own" and stage == "distill":
        for name in ("iter_0000002/__0_0.distcp", "training/metrics.jsonl", ".lock"):
            (output / name).parent.mkdir(exist_ok=True)
            (output / name).write_text("")
    elif holds != "its own":
        (output / holds).parent.mkdir(exist_ok=True)
        (output / holds).write_text("mine")
    if holds == "its own":
        outputs.check_folder(output, overwrite=True)
    else:
        with pytest.raises(UsageError, match="it holds more than the stage's output"):
            outputs.check_folder(output, overwrite=True)


def test_an_output_is_valid_as_long_as_every_input_is_what_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["quantize.py"])
    model, data, recipe = (tmp_path / name for name in ("model", "data", "recipe"))
    for path in (model, data, recipe):
        path.write_text(path.name)
    described = {path.name: manifest.describe_input(path.name, path) for path in (data, recipe)}
    inputs = [manifest.describe_input("model", model), described["recipe"]]
    output = tmp_path / "output"
    output.mkdir()

    def is_valid(*read):
        record = {"quantization": {"calibration": {"data": read}}}
        manifest.Manifest("quantize", {}, inputs=inputs, extra=record).write(output)
        return validity.is_valid(output, str(model), ["quantize.py"])

    assert is_valid(described["data"], {"role": "data", "path": "org/name"})
    for path in (data, recipe):
        path.write_text("another")
        assert not is_valid(described["data"])
        path.write_text(path.name)
    # A training run that was resumed with other data has both.
    assert is_valid({**described["data"], "sha256": "0"}, described["data"])
    assert validity.gone_inputs(output) == []
    data.unlink()
    assert is_valid(described["data"])
    assert validity.gone_inputs(output) == [str(data)]


def test_a_folder_of_somebody_else_is_not_taken_for_what_a_killed_run_left(tmp_path):
    work = tmp_path / "model.incomplete"
    (work / "part").mkdir(parents=True)
    (work / "part" / "weights").write_text("a download")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"model\.incomplete.* holds something else"):
            outputs.check_folder(tmp_path / "model", overwrite=overwrite)
    (work / "part").rename(tmp_path / "model.part")
    assert files.begin(tmp_path / "model") == work
    (tmp_path / "model.part").rename(work / "part")
    outputs.check_folder(tmp_path / "model", overwrite=False)
    assert not [*files.tree(files.begin(tmp_path / "model"))]
    files.publish(tmp_path / "model")
    assert not [*(tmp_path / "model").iterdir()]


def test_a_file_of_somebody_else_is_not_taken_for_rows_of_a_run(tmp_path):
    (tmp_path / "answers.jsonl.incomplete").write_text("a download")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="is of no run"):
            resumable_jsonl.check(tmp_path / "answers.jsonl", {}, overwrite=overwrite)


@pytest.mark.parametrize("name", ["../run.json", "/etc/passwd", "weights", "x" * 300])
def test_a_manifest_names_the_files_of_its_folder_once(name, tmp_path):
    content = manifest.read(own_output(tmp_path / "run"))
    content["outputs"].append({"file": name, "bytes": 1})
    files.write_json(tmp_path / "run" / manifest.FILE, manifest.sealed(content))
    with pytest.raises(UsageError, match=r"outside of its folder|an output twice|that no file has"):
        manifest.read(tmp_path / "run")


def test_a_folder_with_a_name_that_runs_use_is_not_one_of_theirs(tmp_path):
    for name in ("training/data/x", "settings.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(UsageError, match=r"more than the stage's output: settings\.json"):
        run_folder.check_folder(tmp_path, "distill", overwrite=True)
    with pytest.raises(UsageError, match="it holds something else"):
        features.check_folder(tmp_path, None, overwrite=True)


def test_a_copy_that_someone_keeps_beside_the_output_stays(tmp_path):
    copies = [own_output(tmp_path / "run"), own_output(tmp_path / "run.previous")]
    (files.begin(copies[0]) / "weights").write_text("new")
    files.publish(copies[0])
    assert [(each / "weights").read_text() for each in copies] == ["new", "w"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["run", "run.previous"]


@pytest.mark.parametrize("kind", ["a file of mine", *SPECIAL])
def test_a_file_with_the_name_of_the_lock_is_neither_opened_nor_deleted(kind, tmp_path):
    path = tmp_path / "poetry.lock"
    path.write_text("mine") if kind == "a file of mine" else special(path, kind)
    for attempt in (locks.check, lambda target: locks.hold(target, "x").__enter__()):
        with pytest.raises(UsageError, match=r"poetry\.lock"):
            attempt(tmp_path / "poetry")
    assert os.path.lexists(path)


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("data/run", "would be a part of it"),
        ("run.incomplete", "name before"),
        ("loop", None),
        ("x" * 231, "longer than 230 bytes"),
    ],
)
def test_a_place_in_which_an_output_would_do_harm_is_refused(output, cause, tmp_path):
    (tmp_path / "data").mkdir()
    special(tmp_path / "loop", "link to itself")
    given = {"--finetune-data-files": [str(tmp_path / "data")], "--log-level": str(tmp_path)}
    if cause is None:
        outputs.check_apart({"--save": tmp_path / output}, given)
        return
    with pytest.raises(UsageError, match=cause):
        outputs.check_apart({"--save": tmp_path / output}, given)
