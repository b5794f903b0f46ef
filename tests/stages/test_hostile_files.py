"""A checkpoint that names a function to call is refused by name, and the function is not called."""

from __future__ import annotations

import io
import json
import pickle
import shutil

import pytest
import tools
import torch

from post_training.checkpoints import torch_dist


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A quantized checkpoint, and a training run with one iteration."""
    folder = tmp_path_factory.mktemp("hostile")
    tools.random_model(folder / "model", "qwen3", torch.bfloat16, num_hidden_layers=2)
    texts = tools.write_texts(folder / "text.jsonl")
    source = ("--pretrained-model-path", folder / "model")
    tools.run(
        "quantize.py", *source, "--export-quant-cfg", "FP8_DEFAULT_CFG", "--skip-generate",
        *("--calib-dataset-path-or-name", texts, "--calib-size", 2, "--save", folder / "q"),
        *("--calib-max-sequence-length", 64),
    )  # fmt: skip
    tools.run("convert.py", *source, "--save", folder / "student")
    tools.run("distill.py", *training(folder, folder / "run", 1))
    return folder


def training(work, save, iterations):
    return (
        *("--load", work / "student", "--teacher", work / "model", "--save", save),
        *("--finetune-data-files", work / "text.jsonl", "--train-iters", iterations),
        *("--seq-length", 64, "--eval-iters", 0, "--lr-decay-iters", 9),
    )


def poison_metadata(weights, payload):
    (weights / ".metadata").write_bytes(pickle.dumps(payload))


def poison_modelopt_state(weights, payload):
    poison_metadata(weights / torch_dist.MODELOPT_STATE, payload)


def poison_entry(name):
    """Puts the payload in the place of a byte entry of the checkpoint, at the end of a file."""

    def poison(weights, payload):
        metadata = pickle.loads((weights / ".metadata").read_bytes())
        entry = next(i for i in metadata.storage_data if i.fqn.startswith(name))
        place = metadata.storage_data[entry]
        path = weights / place.relative_path
        stream = io.BytesIO()
        torch.save(payload, stream)
        place.offset, place.length = path.stat().st_size, stream.tell()
        with path.open("ab") as file:
            file.write(stream.getvalue())
        (weights / ".metadata").write_bytes(pickle.dumps(metadata))

    return poison


def poison_common(weights, payload):
    """Older checkpoints of Megatron-LM keep arguments and settings in a file of their own."""
    torch.save(payload, weights / "common.pt")


VECTORS = {
    "list of tensors": ("q", poison_metadata),
    "ModelOpt's list": ("q", poison_modelopt_state),
    "arguments": ("q", poison_entry("common_state")),
    "arguments in a file": ("q", poison_common),
    "extra state of a layer": ("q", poison_entry("decoder.layers")),
    "random state": ("run", poison_entry("rng_state")),
    "arguments of an iteration": ("run", poison_entry("common_state")),
}


@pytest.mark.parametrize("vector", VECTORS)
def test_a_payload_is_refused_and_does_not_run(work, tmp_path, vector):
    name, poison = VECTORS[vector]
    folder, ran = tmp_path / name, tmp_path / "ran"
    shutil.copytree(work / name, folder)
    poison(torch_dist.iteration_folder(folder), Payload(ran))
    tools.describe_again(folder)
    if name == "q":
        done = tools.run("export.py", "--load", folder, "--export-dir", tmp_path / "e", code=2)
    else:
        done = tools.run("distill.py", *training(work, folder, 2), code=2)
    assert "io.open" in done.stderr and "any code" in done.stderr
    assert not ran.exists()


def garble(path):
    content = bytearray(path.read_bytes())
    for place in range(min(300, len(content) // 2), len(content), 97):
        content[place] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize(
    "name", [".metadata", f"{torch_dist.MODELOPT_STATE}/.metadata", "metadata.json"]
)
def test_a_damaged_checkpoint_is_said_to_be_damaged(work, tmp_path, name):
    """Also where the hashes are not compared, or there are none."""
    damaged = tmp_path / "damaged"
    shutil.copytree(work / "q", damaged)
    garble(damaged / "release" / name)
    flags = ("--load", damaged, "--no-verify", "--export-dir", tmp_path / "out")
    done = tools.run("export.py", *flags, code=2)
    assert f"checkpoint {damaged}" in done.stderr
    assert "cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_config_json_that_transformers_refuses_is_named(work, tmp_path):
    """Every value that decides the architecture is right."""
    source = tmp_path / "model"
    shutil.copytree(work / "model", source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "initializer_range": None}))
    flags = ("--pretrained-model-path", source, "--save", tmp_path / "out")
    done = tools.run("convert.py", *flags, code=2)
    assert f"{source}/config.json" in done.stderr and "initializer_range" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
