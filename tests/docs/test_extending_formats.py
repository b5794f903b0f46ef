"""docs/extending.md, "A number format" and "An engine": doing what they say is enough."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import extending
import pytest
import speed
import tools
import torch

NEW = {
    "post_training/quantization/formats/int6.py",
    "post_training/export/decoders/int6.py",
    "post_training/quantization/engines/example.py",
}
ROWS = {
    "post_training/quantization/formats/registry.py",
    "post_training/export/decoders/registry.py",
    "post_training/quantization/engines/registry.py",
}


def python(root: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run Python in a copy of the repository, which comes first on the path."""
    environment = {
        **tools.environment(),
        "PYTHONPATH": os.pathsep.join((str(root), str(root / "tests" / "helpers"))),
    }
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=speed.scaled(300),
    )


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository after both sections."""
    root = extending.copy_of_repository(tmp_path_factory.mktemp("extended") / "repository")
    before = extending.contents(root)
    created, changed = set(), set()
    for title in ("A number format", "An engine"):
        new, rows = extending.follow(extending.section(title), root)
        created |= new
        changed |= rows
    assert (created, changed) == (NEW, ROWS)
    after = extending.contents(root)
    assert {name for name in after if name not in before} == NEW
    assert {name for name in before if after[name] != before[name]} == ROWS
    return root


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "model"
    tools.random_model(folder, "qwen3", torch.bfloat16, num_hidden_layers=1)
    return folder


def check(root, source, tmp_path, *flags):
    return python(
        root,
        "quantize.py",
        *("--check", "--pretrained-model-path", source, "--save", tmp_path / "saved"),
        *("--calib-dataset-path-or-name", tools.write_texts(tmp_path / "text.jsonl")),
        *flags,
    )


def test_the_format_and_the_engine_are_in_the_table(extended):
    lines = python(extended, "tests/helpers/formats_table.py").stdout.splitlines()
    assert "| `INT6_DEFAULT_CFG` | `int6` | int6: 8 | 16-bit | all | INT6 | example |" in lines
    row = "| weights alone | weights alone | yes | no | read in the loader's source |"
    assert f"| INT6 | Example 1.0 {row} example/loader.py |" in lines
    assert any(line.startswith("| FP8 | Example 1.0 | no | yes | yes | yes |") for line in lines)


def test_quantize_accepts_the_format(extended, source, tmp_path):
    done = check(extended, source, tmp_path, "--export-quant-cfg", "int6", "--target", "example")
    assert done.returncode == 0, done.stderr
    other = check(extended, source, tmp_path, "--export-quant-cfg", "int6")
    assert other.returncode == 2
    assert "vLLM (0.24.0) is not known to read INT6" in other.stderr
    assert "; Example would" in other.stderr
    refused = check(tools.ROOT, source, tmp_path, "--export-quant-cfg", "int6")
    assert refused.returncode == 2
    assert "no quantization format has this name" in refused.stderr


def test_a_format_that_no_engine_reads_is_refused(source, tmp_path):
    root = extending.copy_of_repository(tmp_path / "repository")
    extending.follow(extending.section("A number format"), root)
    refused = check(root, source, tmp_path, "--export-quant-cfg", "int6")
    assert refused.returncode == 2
    assert "no engine reads int6 with 16-bit inputs" in refused.stderr
    allowed = ("--export-quant-cfg", "int6", "--allow-unexportable")
    assert check(root, source, tmp_path, *allowed).returncode == 0


DECODE = """
import json, torch
from post_training.export.decoders.registry import DECODERS
stored = torch.tensor([[31, -32, 1], [2, 0, -3]], dtype=torch.int8)
scales = {"layer.weight_scale": torch.tensor([0.5, 2.0])}
print(json.dumps(DECODERS["INT6"].decode(scales.__getitem__, "layer", stored).tolist()))
"""


def test_the_decoder_decodes(extended):
    done = python(extended, "-c", DECODE)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[15.5, -16.0, 0.5], [4.0, 0.0, -6.0]]


def test_a_model_quantizes_to_the_format(extended, source, tmp_path):
    """The names that the file declares are what ModelOpt's quantizers are recognised as."""
    saved = tmp_path / "saved"
    done = python(
        extended,
        "quantize.py",
        *("--pretrained-model-path", source, "--save", saved, "--skip-generate"),
        *(
            "--export-quant-cfg",
            "int6",
            "--target",
            "example",
            "--calib-size",
            1,
            "--calib-max-sequence-length",
            32,
        ),
        *("--calib-dataset-path-or-name", tools.write_texts(tmp_path / "text.jsonl")),
    )
    assert done.returncode == 0, done.stderr
    manifest = json.loads((saved / "run.json").read_text())
    assert manifest["quantization"]["quant_algo"] == "INT6"
    assert manifest["metrics"]["coverage"]["bits_per_quantized_weight"] == 8
    assert manifest["metrics"]["coverage"]["quantizers"] == {"weight": 4}
