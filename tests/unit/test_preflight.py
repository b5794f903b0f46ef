"""Bad inputs: exit code 2, within a second, without torch, with what, value, cause and remedy."""

from __future__ import annotations

import importlib
import json
import os
import resource
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import speed
import yaml
from model_folders import CONFIG, write_checkpoint, write_model
from test_damaged_files import LLAMA

from post_training.checkpoints.source import checkpoint_folder
from post_training.common import files, inputs, outputs
from post_training.common.errors import UsageError
from post_training.config import arguments, checks
from post_training.data import document_formats
from post_training.distillation import options as distillation
from post_training.distributed.parallel import Parallel
from post_training.drafts.eagle3 import draft
from post_training.models import parallel_check, tokenizer_files
from post_training.models.architecture import Architecture
from post_training.models.families import registry as families
from post_training.models.parallel_check import layers_per_stage

ROOT = Path(__file__).resolve().parents[2]
# Seconds, starting Python included. The processor's, since the clock's depend on what else runs.
LIMIT = 1.0
# The stage, run as a user runs it, with one more line of output: whether torch was imported.
PROGRAM = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("torch" in sys.modules)
"""


def stage(script: str, *flags: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, script, *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=speed.scaled(60),
        check=False,
    )


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result of ``run``, its seconds on the clock, and the processor's in its child processes."""
    began, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    result = run()
    wall, now = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return result, wall, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


# Each makes a bad input in a folder and returns convert.py's flags, and parts of the message.
Case = Callable[[Path], tuple[list[object], list[str]]]


def missing_folder(work: Path):
    write_model(work / "Qwen3-0.6B")
    path = work / "Qwen3-0.6"
    return ["--pretrained-model-path", path], [
        str(path),
        "no such folder",
        "Did you mean: Qwen3-0.6B",
    ]


def a_file_instead_of_a_folder(work: Path):
    (work / "model.bin").write_text("x")
    return ["--pretrained-model-path", work / "model.bin"], ["model.bin", "a file, not a folder"]


def empty_folder(work: Path):
    (work / "empty").mkdir()
    return ["--pretrained-model-path", work / "empty"], ["empty", "the folder is empty", "org/name"]


def no_model_folder(work: Path):
    (work / "readme.txt").write_text("x")
    return ["--pretrained-model-path", work], [str(work), "no config.json"]


def a_megatron_checkpoint_as_hugging_face_folder(work: Path):
    write_checkpoint(work / "m")
    return ["--pretrained-model-path", work / "m"], ["no config.json", "MLM_MODEL_CKPT"]


def config_that_is_no_json(work: Path):
    write_model(work / "m")
    (work / "m" / "config.json").write_text('{"a": ')
    return ["--pretrained-model-path", work / "m"], ["config.json", "cannot be read as JSON"]


def config_that_is_no_object(work: Path):
    write_model(work / "m")
    (work / "m" / "config.json").write_text("[]")
    return ["--pretrained-model-path", work / "m"], ["config.json", "no JSON object"]


def no_weights(work: Path):
    write_model(work / "m")
    (work / "m" / "model.safetensors").unlink()
    return ["--pretrained-model-path", work / "m"], ["model.safetensors", "download the weights"]


def pickled_weights(work: Path):
    write_model(work / "m")
    (work / "m" / "model.safetensors").rename(work / "m" / "pytorch_model.bin")
    return ["--pretrained-model-path", work / "m"], ["pytorch_model.bin", "save_pretrained"]


def a_shard_is_missing(work: Path):
    write_model(work / "m")
    name = "model-00001-of-00002.safetensors"
    (work / "m" / "model.safetensors").rename(work / "m" / name)
    index = {"weight_map": {"a": name, "b": "model-00002-of-00002.safetensors"}}
    (work / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    return ["--pretrained-model-path", work / "m"], ["model-00002-of-00002", "missing", "index"]


def truncated_weights(work: Path):
    path = write_model(work / "m") / "model.safetensors"
    os.truncate(path, path.stat().st_size - 10)
    return ["--pretrained-model-path", work / "m"], [str(path), "truncated", "again"]


def weights_shorter_than_their_header(work: Path):
    path = write_model(work / "m") / "model.safetensors"
    os.truncate(path, 30)
    return ["--pretrained-model-path", work / "m"], [str(path), "30 bytes", "header"]


def weights_with_a_broken_header(work: Path):
    path = write_model(work / "m") / "model.safetensors"
    path.write_bytes(struct.pack("<Q", 4) + b"{{{{" + bytes(100))
    return ["--pretrained-model-path", work / "m"], [str(path), "header cannot be read"]


def unknown_architecture(work: Path):
    write_model(work / "m", {**CONFIG, "architectures": ["Qwen3ForCausalLN"]})
    return ["--pretrained-model-path", work / "m"], ["Qwen3ForCausalLN", "Did you mean: Qwen3"]


def rotary_scaling_without_a_factor(work: Path):
    write_model(work / "m", {**CONFIG, "rope_parameters": {"rope_type": "llama3"}})
    return ["--pretrained-model-path", work / "m"], ["config.json", "factor"]


def a_rotary_base_that_is_null(work: Path):
    scaling = {"rope_type": "default", "rope_theta": None}
    write_model(work / "m", {**CONFIG, "rope_parameters": scaling})
    return ["--pretrained-model-path", work / "m"], ["rope_theta = None"]


def rotary_parameters_that_are_a_list(work: Path):
    write_model(work / "m", {**CONFIG, "rope_parameters": ["default"]})
    return ["--pretrained-model-path", work / "m"], ["config.json", "not what it has to be"]


def already_quantized_source(work: Path):
    method = {"quant_method": "awq", "bits": 4}
    write_model(work / "m", {**CONFIG, "quantization_config": method})
    return ["--pretrained-model-path", work / "m"], ["config.json", "awq", "already quantized"]


def already_quantized_source_of_modelopt(work: Path):
    write_model(work / "m")
    (work / "m" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    return ["--pretrained-model-path", work / "m"], ["hf_quant_config.json", "FP8", "quantized"]


def conf_of_another_model(work: Path):
    flags = ["--num-layers", 28, "--hidden-size", 1024]
    parts = ["num_layers is 28 in the conf and 6 in", "hidden_size is 1024 in the conf and 64"]
    return ["--pretrained-model-path", write_model(work / "m"), *flags], parts


def tensor_parallel_size_that_does_not_divide(work: Path):
    flags = ["--tensor-model-parallel-size", 3, "--check"]
    parts = ["TP=3", "4 attention heads", "2 query groups", "TP can be 1, 2"]
    return ["--pretrained-model-path", write_model(work / "m"), *flags], [*parts[:3]]


def pipeline_parallel_size_that_does_not_divide(work: Path):
    flags = ["--pipeline-model-parallel-size", 4, "--check"]
    parts = ["PP=4", "6 layers", "--decoder-first-pipeline-num-layers"]
    return ["--pretrained-model-path", write_model(work / "m"), *flags], parts


def experts_of_a_dense_model(work: Path):
    flags = ["--expert-model-parallel-size", 2, "--check"]
    return ["--pretrained-model-path", write_model(work / "m"), *flags], ["EP=2", "no experts"]


def a_tokenizer_folder_without_tokenizer(work: Path):
    (work / "t").mkdir()
    (work / "t" / "config.json").write_text("{}")
    flags = ["--tokenizer-model", work / "t"]
    parts = ["--tokenizer-model", str(work / "t"), "tokenizer.json", "TOKENIZER_MODEL"]
    return ["--pretrained-model-path", write_model(work / "m"), *flags], parts


def a_tokenizer_folder_that_is_missing(work: Path):
    flags = ["--tokenizer-model", work / "t"]
    return ["--pretrained-model-path", write_model(work / "m"), *flags], [
        "--tokenizer-model",
        "no such",
    ]


def the_models_tokenizer_that_makes_gigabytes_of_a_line(work: Path):
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    steps = {"type": "Sequence", "normalizers": [step] * 40}
    model = write_model(work / "m")
    (model / "tokenizer.json").write_text(json.dumps({"normalizer": steps}))
    flags = ["--pretrained-model-path", model, "--tokenizer-model", model]
    return flags, [str(model / "tokenizer.json"), "normalizer", "times as long"]


def an_adapter_beside_a_model(work: Path):
    (write_model(work / "m") / "adapter_config.json").write_text("{}")
    flags = ["--pretrained-model-path", work / "m"]
    return flags, ["adapter_config.json", "PEFT", "merge_and_unload"]


def an_index_of_other_files_beside_a_whole_model(work: Path):
    model = write_model(work / "m")
    (write_model(work / "n") / "model.safetensors").rename(model / "model-1.safetensors")
    names = {"weight_map": {"model.norm.weight": "model-1.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(names))
    return ["--pretrained-model-path", model], ["besides its files, model.safetensors"]


def a_tensor_in_two_files(work: Path):
    model = write_model(work / "m")
    other = write_model(work / "n", None, **{"a": [1], "model.norm.weight": [64]})
    (other / "model.safetensors").rename(model / "model-1.safetensors")
    names = {"model.norm.weight": "model.safetensors", "a": "model-1.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    parts = ["it has model.norm.weight, and so has", "model-1.safetensors"]
    return ["--pretrained-model-path", model], parts


def an_occupied_output_folder(work: Path):
    (work / "out").mkdir()
    (work / "out" / "notes.txt").write_text("mine")
    flags = ["--save", work / "out"]
    parts = [str(work / "out"), "not empty", "--overwrite"]
    return ["--pretrained-model-path", write_model(work / "m"), *flags], parts


def an_output_that_a_stage_made(work: Path):
    write_checkpoint(work / "out", stage="convert", command="x", finished="today")
    flags = ["--save", work / "out"]
    parts = ["output of convert", "complete", "--overwrite"]
    return ["--pretrained-model-path", write_model(work / "m"), *flags], parts


def an_output_below_a_file(work: Path):
    (work / "file").write_text("x")
    flags = ["--save", work / "file" / "out"]
    return ["--pretrained-model-path", write_model(work / "m"), *flags], ["is a file"]


def no_disk_space(work: Path):
    try:
        write_model(work / "m", huge=[1 << 21, 1 << 21])
    except OSError:
        pytest.skip("this file system has no files of 8 TB, not even empty ones")
    return ["--pretrained-model-path", work / "m"], ["TB are needed", "are free", "MLM_WORK_DIR"]


def missing_checkpoint(work: Path):
    return ["--load", work / "nothing"], ["--load", "nothing", "no such folder"]


def a_hugging_face_folder_as_checkpoint(work: Path):
    return ["--load", write_model(work / "m")], ["latest_checkpointed", "HF_MODEL_CKPT"]


def a_checkpoint_whose_iteration_is_missing(work: Path):
    return ["--load", write_checkpoint(work / "m", "100")], ["iter_0000100", "missing"]


def a_checkpoint_with_a_broken_tracker(work: Path):
    return ["--load", write_checkpoint(work / "m", "tomorrow")], ["'tomorrow'", "iteration number"]


def a_checkpoint_without_weights(work: Path):
    folder = write_checkpoint(work / "m")
    (folder / "release" / "__0_0.distcp").unlink()
    return ["--load", folder], ["no weights", "distcp"]


def a_checkpoint_of_another_model(work: Path):
    shape = {"num_layers": 6, "hidden_size": 64, "num_attention_heads": 4}
    architecture = Architecture(shape, 512, 128).to_json()
    folder = write_checkpoint(work / "m", stage="convert", architecture=architecture)
    parts = ["num_layers is 28 in the conf and 6 in the checkpoint"]
    return ["--load", folder, "--num-layers", 28], parts


def a_checkpoint_of_which_a_file_was_cut(work: Path):
    shape = {"num_layers": 6, "hidden_size": 64, "num_attention_heads": 4}
    content = {"format": 1, "architecture": Architecture(shape, 512, 128).to_json()}
    content["outputs"] = [{"file": "release/__0_0.distcp", "bytes": 99}]
    folder = write_checkpoint(work / "m")
    (folder / "run.json").write_text(json.dumps(content))
    return ["--load", folder], ["__0_0.distcp", "cut short"]


def no_model_named(work: Path):
    return [], ["HF_MODEL_CKPT", "MLM_MODEL_CKPT"]


CASES: list[Case] = [
    missing_folder,
    a_file_instead_of_a_folder,
    empty_folder,
    no_model_folder,
    a_megatron_checkpoint_as_hugging_face_folder,
    config_that_is_no_json,
    config_that_is_no_object,
    no_weights,
    pickled_weights,
    a_shard_is_missing,
    truncated_weights,
    weights_shorter_than_their_header,
    weights_with_a_broken_header,
    unknown_architecture,
    rotary_scaling_without_a_factor,
    a_rotary_base_that_is_null,
    rotary_parameters_that_are_a_list,
    already_quantized_source,
    already_quantized_source_of_modelopt,
    conf_of_another_model,
    tensor_parallel_size_that_does_not_divide,
    pipeline_parallel_size_that_does_not_divide,
    experts_of_a_dense_model,
    a_tokenizer_folder_without_tokenizer,
    a_tokenizer_folder_that_is_missing,
    the_models_tokenizer_that_makes_gigabytes_of_a_line,
    an_adapter_beside_a_model,
    an_index_of_other_files_beside_a_whole_model,
    a_tensor_in_two_files,
    an_occupied_output_folder,
    an_output_that_a_stage_made,
    an_output_below_a_file,
    no_disk_space,
    missing_checkpoint,
    a_hugging_face_folder_as_checkpoint,
    a_checkpoint_whose_iteration_is_missing,
    a_checkpoint_with_a_broken_tracker,
    a_checkpoint_without_weights,
    a_checkpoint_of_another_model,
    a_checkpoint_of_which_a_file_was_cut,
    no_model_named,
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_convert_refuses(case, tmp_path):
    flags, parts = case(tmp_path)
    if "--save" not in flags:
        flags = [*flags, "--save", tmp_path / "saved"]
    done, wall, processor = timed(lambda: stage("convert.py", *flags))
    print(f"{wall:.2f} s, of which processor {processor:.2f} s: {done.stderr}")
    assert done.returncode == 2, done.stderr
    assert done.stdout == "False\n", "torch was imported"
    assert done.stderr.startswith("error: ")
    assert "\n  cause: " in done.stderr
    assert "\n  remedy: " in done.stderr
    for part in parts:
        assert part in done.stderr
    assert processor < LIMIT


def test_a_good_model_folder_passes_without_torch(tmp_path):
    flags = ["--pretrained-model-path", write_model(tmp_path / "m"), "--save", tmp_path / "out"]
    done = stage("convert.py", *flags, "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_a_hub_name_passes_offline(tmp_path):
    done = stage("convert.py", "--pretrained-model-path", "org/name", "--save", tmp_path / "out",
                 "--check")  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_overwrite_allows_an_occupied_output(tmp_path):
    names = ("release/metadata.json", "release/__0_0.distcp", "latest_checkpointed_iteration.txt")
    outputs = [{"file": name, "bytes": 1} for name in names]
    write_checkpoint(tmp_path / "out", stage="convert", command="x", outputs=outputs)
    flags = ["--pretrained-model-path", write_model(tmp_path / "m"), "--save", tmp_path / "out"]
    assert stage("convert.py", *flags, "--check", "--overwrite").returncode == 0


@pytest.mark.parametrize(
    ("value", "is_name"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("meta-llama/Llama-3.1-8B-Instruct", True),
        ("/models/x", False),
        ("./org/name", False),
        ("../name", False),
        ("~/name", False),
        ("a/b/c", False),
        ("name", False),
        ("", False),
    ],
)
def test_a_hub_name_is_told_from_a_path_by_its_form(value, is_name):
    assert inputs.is_hub_name(value) is is_name


def test_an_existing_path_is_never_a_hub_name(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not inputs.is_hub_name("org/name")


def test_a_checkpoints_iteration_can_be_named_directly(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    assert checkpoint_folder(folder) == folder / "release"
    assert checkpoint_folder(folder / "release") == folder / "release"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["no rows"]),
        ('{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        ('{"text": "a"}\n[1]\n', ["line 2", "not an object"]),
        ('{"text": "a"}\n\n{"body": "b"}\n', ["line 3", "body"]),
    ],
)
def test_the_first_bad_line_of_a_data_file_is_named(text, parts, tmp_path):
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(UsageError) as refused:
        document_formats.check(str(tmp_path / "data.jsonl"), "--calib-dataset-path-or-name")
    for part in ["--calib-dataset-path-or-name", "data.jsonl", *parts]:
        assert part in str(refused.value)


def test_a_data_file_that_is_not_there_is_refused_and_a_hub_name_is_not(tmp_path):
    with pytest.raises(UsageError, match="no such file"):
        document_formats.check(str(tmp_path / "none.jsonl"), "--x")
    document_formats.check("org/name", "--x")


def test_a_tokenizer_folder_has_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        tokenizer_files.check(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    tokenizer_files.check(str(tmp_path))
    tokenizer_files.check("Qwen/Qwen3-0.6B")


A = "a" * 256


@pytest.mark.parametrize(
    ("part", "is_read"),
    [
        # As in Llama 2, and in Gemma's decoder.
        ({"normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}, True),
        ({"decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}}, True),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": "▁"}}, True),
        ({"normalizer": {"type": "Replace", "pattern": {"Regex": ""}, "content": "▁" * 99}}, False),
        ({"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": A}}, False),
        ({"decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": "x" * 999}}, False),
        ({"decoder": {"type": "Sequence", "decoders": [{"type": "ByteLevel"}] * 9}}, False),
        ({"normalizer": {"type": "Replace", "pattern": [], "content": None}}, True),
        ({"normalizer": [], "decoder": None}, True),
    ],
)  # fmt: skip
def test_a_tokenizer_may_not_multiply_a_text(part, is_read, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(part))
    if is_read:
        return tokenizer_files.check(str(tmp_path))
    with pytest.raises(UsageError, match="times as long"):
        tokenizer_files.check(str(tmp_path))


def test_an_option_that_is_needed_is_named_with_its_variable():
    with pytest.raises(UsageError, match="set EXPORT_DIR or --export-dir"):
        checks.required("--export-dir", None, "EXPORT_DIR")


@pytest.mark.parametrize(
    ("layers", "sizes", "expected"),
    [
        (6, {"pipeline": 1}, [6]),
        (6, {"pipeline": 3}, [2, 2, 2]),
        (61, {"pipeline": 4, "first_layers": 16, "last_layers": 13}, [16, 16, 16, 13]),
        (7, {"pipeline": 2, "first_layers": 3}, [3, 4]),
        (7, {"pipeline": 2, "last_layers": 3}, [4, 3]),
        (7, {"pipeline": 2, "first_layers": 4, "last_layers": 3}, [4, 3]),
    ],
)
def test_layers_are_spread_over_pipeline_stages(layers, sizes, expected):
    assert layers_per_stage(layers, Parallel(**sizes)) == expected


@pytest.mark.parametrize(
    ("layers", "sizes"),
    [
        (6, {"pipeline": 4}),
        (2, {"pipeline": 4}),
        (6, {"pipeline": 1, "first_layers": 3}),
        (7, {"pipeline": 3, "first_layers": 4}),
        (7, {"pipeline": 2, "first_layers": 4, "last_layers": 4}),
        (6, {"pipeline": 3, "first_layers": 0}),
        (6, {"pipeline": 2, "first_layers": 6}),
    ],
)
def test_layers_that_cannot_be_spread_are_refused(layers, sizes):
    with pytest.raises(UsageError):
        layers_per_stage(layers, Parallel(**sizes))


def test_experts_are_divided_by_their_own_sizes():
    shape = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_moe_experts": 8}
    model = Architecture({**shape, "moe_ffn_hidden_size": 96}, 512, 128)
    parallel_check.check(model, Parallel(tensor=4, expert=4, expert_tensor=1))
    with pytest.raises(UsageError, match="EP=3"):
        parallel_check.check(model, Parallel(expert=3))
    with pytest.raises(UsageError, match="ETP=64"):
        parallel_check.check(model, Parallel(expert_tensor=64))


def test_an_unwritable_value_is_reported_with_the_free_space(tmp_path):
    with pytest.raises(UsageError, match=r"about 1000\.00 TB are needed and \d"):
        outputs.disk_space(tmp_path / "a" / "b", 10**15)


def test_a_full_disk_is_reported_for_the_output_and_other_errors_are_not(tmp_path):
    output = tmp_path / "output"
    with pytest.raises(OSError) as full, Path("/dev/full").open("w", encoding="utf-8") as device:
        device.write("x")
    outer = RuntimeError("failed writing file")  # as torch's writers put it
    outer.__cause__ = full.value
    for error in (full.value, outer):
        message = str(outputs.full_disk(error, [output]))
        assert f"output {output}" in message and "No space left on device" in message
    for error in (RuntimeError("x"), FileNotFoundError(2, "x"), UsageError("a", "b", "c")):
        assert outputs.full_disk(error, [output]) is None


def test_a_limit_of_file_sizes_is_named(tmp_path):
    """As of a batch system; torch's error says neither the cause nor the file."""
    work = files.begin(tmp_path / "output")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        (work / "weights").write_bytes(b"x" * 4000)
        assert outputs.full_disk(RuntimeError("x"), [tmp_path / "output"]) is None
        with pytest.raises(OSError, match="too large"):
            (work / "weights").write_bytes(b"x" * 5000)
        found = outputs.full_disk(RuntimeError("worker failure"), [tmp_path / "output"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "output.incomplete/weights" in str(found) and "ulimit -f" in str(found)


@pytest.mark.parametrize("check", [checks.positive, checks.at_least(1)])
def test_a_number_of_a_flag_is_finite_and_not_too_small(check):
    check("--calib-size", 1)
    check("--calib-size", 10**400)  # more than a float holds
    for value in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="--calib-size"):
            check("--calib-size", value)


@pytest.mark.parametrize("value", [".nan", ".inf", "1" + "0" * 400, "-1"])
def test_a_number_of_a_file_is_finite_and_positive(value, tmp_path):
    (tmp_path / "kd.yaml").write_text(f"kd_loss_scale: {value}")
    with pytest.raises(UsageError, match=r"finite|large|positive"):
        distillation.read(str(tmp_path / "kd.yaml"))
    number = yaml.safe_load(value)
    target = families.from_huggingface(LLAMA)
    for key in ("rms_norm_eps", "rope_theta", "num_hidden_layers"):
        if key != "num_hidden_layers" or isinstance(number, int):
            with pytest.raises(UsageError, match=key):
                draft.configuration(target, {key: number})


def test_a_flag_with_a_meaning_for_its_least_value_says_so():
    options = importlib.import_module("generate").STAGE.options
    with pytest.raises(UsageError) as refused:
        arguments.parse("generate", options, ["--top-k", "-1"])
    assert refused.value.remedy == "give 0 for all tokens"
