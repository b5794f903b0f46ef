"""Files of any content end in a UsageError or are read; no other exception reaches the user."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from model_folders import CONFIG, write_checkpoint, write_model

from convert import ConvertOptions
from post_training.checkpoints.source import find_source
from post_training.common import manifest
from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.drafts.eagle3 import draft
from post_training.drafts.eagle3.draft import Draft
from post_training.models.families import registry as families

NUMBERS = (True, 7, -1, 0, 0.5, 10**30, float("inf"))
VALUES = (*NUMBERS, None, "x", "", [], [None], {}, {"a": []}, [[7]])
LLAMA = {
    **CONFIG,
    "architectures": ["LlamaForCausalLM"],
    "rope_parameters": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
}
QWEN = {
    **CONFIG,
    "layer_types": ["full_attention"] * 6,
    "use_sliding_window": False,
    "max_window_layers": 6,
    "rope_scaling": None,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "max_position_embeddings": 512,
    "eos_token_id": 1,
}


def variants(content: Any) -> Iterator[tuple[str, Any]]:
    """The content with each value in turn replaced by others, or left out; and their place."""
    yield from (("", value) for value in VALUES)
    for path in places(content):
        for value in (*VALUES, ...):
            changed = copy.deepcopy(content)
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if value is ...:
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            yield f"{'.'.join(map(str, path))} = {value!r}", changed


def places(content: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in inner:
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


def find(*flags: object) -> None:
    line = [*map(str, flags), "--save", "/x", "--check"]
    find_source(arguments.parse("convert", ConvertOptions, line))


def unexpected(path: Path, content: Any, *flags: object) -> list[str]:
    """Which variants of the file end in something else than a UsageError, and in what."""
    found = []
    for name, changed in variants(content):
        path.write_text(json.dumps(changed))
        try:
            find(*flags)
        except UsageError:
            continue
        except Exception as error:
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found


@pytest.mark.parametrize("config", [LLAMA, QWEN], ids=["llama", "qwen"])
def test_a_config_with_other_values(tmp_path, config):
    write_model(tmp_path, config)
    flags = ("--pretrained-model-path", tmp_path)
    assert unexpected(tmp_path / "config.json", config, *flags) == []


def test_an_index_with_other_values(tmp_path):
    write_model(tmp_path)
    weights = {"model.norm.weight": "model.safetensors"}
    index = {"metadata": {"total_size": 128}, "weight_map": weights}
    flags = ("--pretrained-model-path", tmp_path)
    assert unexpected(tmp_path / "model.safetensors.index.json", index, *flags) == []


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/../../x"])
def test_an_index_names_no_file_outside_its_folder(tmp_path, name):
    write_model(tmp_path)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(UsageError, match="weight_map"):
        find("--pretrained-model-path", tmp_path)


def test_a_manifest_with_other_values(tmp_path):
    folder = tmp_path / "checkpoint"
    content = {
        "format": 1,
        "stage": "quantize",
        "command": "quantize.py",
        "architecture": families.from_huggingface(LLAMA).to_json(),
        "inputs": [{"role": "model", "path": "/x", "manifest_sha256": "0"}],
        "outputs": [{"file": "release/__0_0.distcp", "bytes": 1, "xxh3_128": "0"}],
        "versions": {"torch": "2"},
        "quantization": {"format": "fp8", "exportable": True},
        "draft": None,
    }
    write_checkpoint(folder)
    assert unexpected(folder / manifest.FILE, content, "--load", folder) == []


def test_a_recorded_draft_with_other_values():
    """None but sound ones is given on: what later stages read is there, with its type."""
    target = families.from_huggingface(LLAMA)
    recorded = Draft("eagle3", draft.configuration(target), [0, 1, 2]).to_json()
    for name, changed in variants(recorded):
        try:
            found = Draft.from_json(changed)
        except UsageError:
            continue
        for key in ("num_hidden_layers", "torch_dtype", "eagle_aux_hidden_state_layer_ids"):
            assert type(found.config[key]) is type(recorded["config"][key]), name


NO_OBJECTS = {
    "empty": "",
    "open": "{",
    "deep list": "[" * 100_000,
    "deep object": '{"a": ' * 100_000,
    "long number": "9" * 10_000,
    "NUL": "\x00",
    "NaN": '{"format": NaN}',
    "byte order mark": "\ufeff{}",
}


@pytest.mark.parametrize("text", NO_OBJECTS.values(), ids=NO_OBJECTS)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "run.json"])
def test_what_is_no_json_object(tmp_path, text, file):
    folder = write_model(tmp_path / "model")
    flags: tuple[object, ...] = ("--pretrained-model-path", folder)
    if file == "run.json":
        folder = write_checkpoint(tmp_path / "checkpoint", stage="convert")
        flags = ("--load", folder)
    (folder / file).write_text(text, encoding="utf-8")
    with pytest.raises(UsageError):
        find(*flags)


def test_no_flipped_bit_of_a_manifest_changes_what_is_read(tmp_path):
    record = manifest.Manifest("convert", {"num_layers": 2}, metrics={"seconds": 0.5, "text": "ä"})
    (tmp_path / "weights").write_bytes(b"content")
    record.write(tmp_path)
    path = tmp_path / manifest.FILE
    written, content = path.read_bytes(), manifest.read(tmp_path)
    refused = 0
    for bit in range(8 * len(written)):
        changed = bytearray(written)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert manifest.read(tmp_path) == content, (bit, changed)
        except UsageError:
            refused += 1
    assert refused > 7 * len(written)  # the rest is space between values
