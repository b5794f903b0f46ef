"""docs/extending.md, "A stage" and "A draft algorithm": doing what they say is enough."""

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

CONF = """
MODEL_ARGS=(
  --num-layers 2 --hidden-size 128 --num-attention-heads 4 --group-query-attention
  --num-query-groups 2 --kv-channels 64 --ffn-hidden-size 256
)
"""
SECTIONS = {
    "A stage": ({"largest_weight.py", "largest_weight.sh"}, set()),
    "A draft algorithm": (
        {"post_training/drafts/eagle3_deep.py"},
        {"post_training/drafts/registry.py"},
    ),
}


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of the repository after both sections, which name every file that changed."""
    root = extending.copy_of_repository(tmp_path_factory.mktemp("extended") / "repository")
    before = extending.contents(root)
    for title, expected in SECTIONS.items():
        assert extending.follow(extending.section(title), root) == expected
    after = extending.contents(root)
    new, rows = (set().union(*each) for each in zip(*SECTIONS.values(), strict=True))
    assert {name for name in after if name not in before} == new
    assert {name for name in before if after[name] != before[name]} == rows
    return root


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory):
    """A model, and a conf for it outside the repository."""
    root = tmp_path_factory.mktemp("sandbox")
    tools.random_model(root / "model", "qwen3", num_hidden_layers=2)
    (root / "conf" / "model" / "toy").mkdir(parents=True)
    (root / "conf" / "model" / "toy" / "tiny.sh").write_text(CONF)
    return root


def launch(
    root: Path, sandbox: Path, *words: object, code: int = 0, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a launcher of the copy."""
    variables |= {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(root),
        "SANDBOX_ROOT": str(sandbox),
        "HF_MODEL_CKPT": str(sandbox / "model"),
    }
    done = subprocess.run(
        ["bash", *map(str, words)],
        cwd=root,
        env={**tools.environment(), "TMPDIR": os.environ.get("TMPDIR", "/tmp"), **variables},
        capture_output=True,
        text=True,
        timeout=speed.scaled(600),
    )
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def test_the_stage_shows_its_flags(extended, sandbox):
    shown = launch(extended, sandbox, "largest_weight.sh", "--help").stdout
    assert "Find the largest weight of a model." in shown
    assert "weights to list (3)" in shown


def test_the_stage_checks_before_it_loads(extended, sandbox, tmp_path):
    stage = ("largest_weight.sh", "toy/tiny", "--check")
    output = ("--output", tmp_path / "largest.json")
    launch(extended, sandbox, *stage, *output)
    assert not (tmp_path / "largest.json").exists()
    refused = launch(extended, sandbox, *stage, *output, "--most", 0, code=2)
    assert "--most 0" in refused.stderr
    assert "--output" in launch(extended, sandbox, *stage, code=2).stderr


def test_the_stage_runs(extended, sandbox, tmp_path):
    from safetensors.torch import load_file

    output = tmp_path / "largest.json"
    launch(extended, sandbox, "largest_weight.sh", "toy/tiny", "--fp32", "--output", output)
    found = json.loads(output.read_text())
    assert len(found) == 3
    weights = load_file(sandbox / "model" / "model.safetensors").values()
    assert max(found.values()) == max(float(each.abs().max()) for each in weights)


def test_two_ranks_find_the_same_and_say_that_a_flag_is_for_training(extended, sandbox, tmp_path):
    words = ("largest_weight.sh", "toy/tiny", "--fp32", "--most", 50, "--output")
    launch(extended, sandbox, *words, tmp_path / "one.json")
    split = (tmp_path / "two.json", "--sequence-parallel")
    done = launch(extended, sandbox, *words, *split, TP="2")
    assert (tmp_path / "two.json").read_text() == (tmp_path / "one.json").read_text()
    assert done.stderr.count("--sequence-parallel has no effect") == 1


def test_the_draft_algorithm_is_attached_and_recorded(extended, sandbox, tmp_path):
    words = ("convert.sh", "toy/tiny", "--fp32", "--algorithm", "eagle3_deep")
    save = tmp_path / "drafted"
    launch(extended, sandbox, *words, "--save", save)
    draft = json.loads((save / "run.json").read_text())["draft"]
    assert draft["algorithm"] == "eagle3_deep"
    assert draft["config"]["num_hidden_layers"] == 2
    refused = launch(tools.ROOT, sandbox, *words, "--save", tmp_path / "other", "--check", code=2)
    assert "eagle3_deep" in refused.stderr
