"""convert followed by a BF16 export gives back every tensor bit for bit, at every layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tools
import torch
import xxhash
from questions import write_questions
from safetensors.torch import load_file, save_file

from post_training.checkpoints import loading
from post_training.checkpoints.source import Source
from post_training.common import files, manifest
from post_training.models import parameter_count
from post_training.models.architecture import Architecture


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for family in (*tools.FAMILIES, *tools.ROTARY):
        tools.random_model(root / family, family, torch.bfloat16)
    return root


@pytest.fixture(scope="module")
def source(sources):
    return sources / "qwen3"


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def assert_same_tensors(first, second):
    wanted, actual = dict(tools.tensors(first)), dict(tools.tensors(second))
    assert actual.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert actual[name].dtype == tensor.dtype
        assert torch.equal(actual[name].view(torch.int16), tensor.view(torch.int16)), name


@pytest.mark.parametrize("layout", list(tools.LAYOUTS))
def test_round_trip_is_exact(sources, layout, tmp_path):
    processes, flags = tools.LAYOUTS[layout]
    converted = tools.families_at(layout) + list(tools.ROTARY if layout == "TP=1" else ())
    convert = [
        (
            "convert",
            ("--pretrained-model-path", sources / family, "--save", tmp_path / family, *flags),
        )
        for family in converted
    ]
    tools.run_stages(*convert, processes=processes)
    # Export runs at TP=1 and EP=1 whatever the checkpoint was saved at; PP is kept.
    if "--pipeline-model-parallel-size" not in flags:
        processes, flags = 1, ()
    export = [
        ("export", ("--load", tmp_path / family, "--export-dir", tmp_path / f"{family}_hf", *flags))
        for family in converted
    ]
    tools.run_stages(*export, processes=processes)
    for family in converted:
        exported = tmp_path / f"{family}_hf"
        assert_same_tensors(sources / family, exported)
        config = json.loads((exported / "config.json").read_text())
        assert config == json.loads((sources / family / "config.json").read_text())
        record = json.loads((tmp_path / family / "run.json").read_text())
        total = parameter_count.total(Architecture.from_json(record["architecture"]))
        assert record["metrics"]["parameters"] == total, family


def test_shards_have_the_chosen_size_and_an_index(source, tmp_path):
    tools.run_stages(
        ("convert", ("--pretrained-model-path", source, "--save", tmp_path / "megatron")),
        (
            "export",
            (
                *("--load", tmp_path / "megatron", "--export-dir", tmp_path / "exported"),
                *("--max-shard-size", 0.0005),
            ),
        ),
    )
    shards = sorted((tmp_path / "exported").glob("*.safetensors"))
    assert len(shards) > 2
    assert all(shard.stat().st_mode & 0o044 == 0o044 & ~umask() for shard in shards)
    assert all(shard.stat().st_size < 510_000 for shard in shards)
    assert_same_tensors(source, tmp_path / "exported")


def test_checkpoint_moves_between_layouts(source, tmp_path):
    """Saved at TP=2, saved again at PP=2, exported at TP=1: still the same bits."""
    first, second = tmp_path / "tp2", tmp_path / "pp2"
    convert = ("convert", ("--pretrained-model-path", source, "--save", first))
    tools.run_stages((convert[0], (*convert[1], *tools.LAYOUTS["TP=2"][1])), processes=2)
    moved = ("--load", first, "--save", second, *tools.LAYOUTS["PP=2"][1])
    tools.run_stages(("convert", moved), processes=2)
    tools.run_stages(("export", ("--load", second, "--export-dir", tmp_path / "exported")))
    assert_same_tensors(source, tmp_path / "exported")


def test_meta_device_initialisation_gives_the_same_checkpoint(source, tmp_path):
    flags = ("--pretrained-model-path", source, "--save", tmp_path / "megatron")
    tools.run_stages(
        ("convert", (*flags, "--init-model-with-meta-device")),
        ("export", ("--load", tmp_path / "megatron", "--export-dir", tmp_path / "exported")),
    )
    assert_same_tensors(source, tmp_path / "exported")


def test_manifest_names_inputs_outputs_and_architecture(source, tmp_path):
    tools.run("convert.py", "--pretrained-model-path", source, "--save", tmp_path / "megatron")
    tools.run("export.py", "--load", tmp_path / "megatron", "--export-dir", tmp_path / "exported")
    convert = json.loads((tmp_path / "megatron" / "run.json").read_text())
    export = json.loads((tmp_path / "exported" / "run.json").read_text())
    assert convert["architecture"]["transformer"]["num_layers"] == 6
    assert convert["metrics"]["parameters"] > 100_000
    assert export["architecture"] == convert["architecture"]

    assert export["inputs"][0]["manifest_sha256"] == files.sha256(
        tmp_path / "megatron" / "run.json"
    )
    for entry in export["outputs"]:
        path = tmp_path / "exported" / entry["file"]
        data = path.read_bytes()
        assert (entry["bytes"], entry["xxh3_128"]) == (len(data), xxhash.xxh3_128_hexdigest(data))


@pytest.mark.parametrize(
    "file",
    [
        "release/__0_0.distcp",
        "release/.metadata",
        "huggingface/config.json",
        "huggingface/tokenizer.json",
    ],
)
def test_a_flipped_bit_of_a_checkpoint_is_found_before_it_is_loaded(source, tmp_path, file):
    folder = tmp_path / "megatron"
    tools.run("convert.py", "--pretrained-model-path", source, "--save", folder)
    command = ("--load", folder, "--export-dir", tmp_path / "exported")
    valid = [sys.executable, "-m", "post_training.manifest", "valid", str(folder), str(source)]
    assert subprocess.run(valid, cwd=tools.ROOT).returncode == 0
    flip(folder / file)
    assert subprocess.run(valid, cwd=tools.ROOT).returncode != 0
    scored = (*command[:2], "--mmlu-dataset", questions(tmp_path))
    if not file.endswith("distcp"):
        # What lies beside the weights is read before a launch.
        done = tools.run("mmlu.py", *scored, "--check", code=2)
        assert f"{folder / file}" in done.stderr and "--no-verify" in done.stderr
        tools.run("mmlu.py", *scored, "--check", "--no-verify")
        return
    for processes, layout in (tools.LAYOUTS["TP=1"], tools.LAYOUTS["TP=2"]):
        # torchrun has an exit code of its own.
        code = 2 if processes == 1 else 1
        done = tools.run("mmlu.py", *scored, *layout, processes=processes, code=code)
        assert f"{folder / file}" in done.stderr and "--no-verify" in done.stderr
    tools.run("export.py", *command, "--no-verify")


def test_a_flipped_bit_of_an_export_is_found_before_it_is_loaded(source, tmp_path):
    tools.run("convert.py", "--pretrained-model-path", source, "--save", tmp_path / "megatron")
    folder = tmp_path / "exported"
    tools.run("export.py", "--load", tmp_path / "megatron", "--export-dir", folder)
    weights = folder / "model.safetensors"
    flip(weights)
    flags = ("--pretrained-model-path", folder, "--save", tmp_path / "again")
    done = tools.run("convert.py", *flags, code=2)
    assert str(weights) in done.stderr
    # A manifest of an older version has SHA-256.
    content = {**manifest.read(folder), "format": 1}
    for entry in content["outputs"]:
        del entry["xxh3_128"]
        entry["sha256"] = files.sha256(folder / entry["file"])
    (folder / "run.json").write_text(json.dumps(content))
    tools.run("convert.py", *flags)
    flip(weights)
    done = tools.run("convert.py", *flags, "--overwrite", code=2)
    assert str(weights) in done.stderr


def test_an_output_layer_of_its_own_is_not_dropped_for_a_tied_one(tmp_path):
    model = tmp_path / "model"
    tools.random_model(model, "llama3", torch.bfloat16, num_hidden_layers=2,
                       tie_word_embeddings=False)  # fmt: skip
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    flags = ("--pretrained-model-path", model, "--save", tmp_path / "mlm")
    done = tools.run("convert.py", *flags, code=2)
    assert "tie_word_embeddings" in done.stderr and "lm_head.weight" in done.stderr
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    tools.run("convert.py", *flags)


def test_the_log_says_that_a_half_precision_source_is_rounded(tmp_path):
    tools.random_model(tmp_path / "model", "qwen3", torch.float16, num_hidden_layers=2)
    flags = ("--pretrained-model-path", tmp_path / "model", "--save", tmp_path / "mlm")
    assert "F16, which bf16 rounds" in tools.run("convert.py", *flags).stderr
    done = tools.run("convert.py", *flags, "--fp16", "--overwrite")
    assert "rounds" not in done.stderr


@pytest.mark.parametrize("stated", [7, [7, 9], None])
def test_without_a_generation_config_the_models_config_has_the_end_tokens(source, tmp_path, stated):
    folder = tmp_path / "model"
    folder.mkdir()
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": stated}))
    of_model = Source(str(folder), False, None, str(folder))
    options = SimpleNamespace(trust_remote_code=False)
    tokenizer = SimpleNamespace(eos_token_id=3)
    found = loading.end_tokens(of_model, options, tokenizer)
    assert found == sorted({3, *([stated] if isinstance(stated, int) else stated or [])})
    (folder / "generation_config.json").write_text('{"eos_token_id": 5}')
    assert loading.end_tokens(of_model, options, tokenizer) == [3, 5]


def flip(path: Path) -> None:
    """Flip one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def questions(folder: Path) -> Path:
    (folder / "questions").mkdir(exist_ok=True)
    return write_questions(folder / "questions")
