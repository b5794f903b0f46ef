"""A layer that changes nothing is the first to go, and a share of 0 keeps what it is of."""

from __future__ import annotations

import json

import pytest
import tools
import torch

IDENTITY = 4  # counted from 1


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("identity")
    model = tools.random_model(folder / "model", "qwen3")
    layer = model.model.layers[IDENTITY - 1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.save_pretrained(folder / "model")
    tools.write_texts(folder / "text.jsonl")
    return folder


def flags(model, save, *more):
    return (
        *("--pretrained-model-path", model / "model", "--save", save, "--fp32", "--skip-generate"),
        *("--calib-dataset", model / "text.jsonl", "--calib-size", 4),
        *("--calib-max-sequence-length", 64, "--prune-num-layers-divisor", 1, *more),
    )


def test_an_identity_layer_is_cut_first_by_size_and_by_search(model, tmp_path):
    kept = ("--prune-intermediate-ckpt", tmp_path / "scores")
    named = ("--prune-export-config", json.dumps({"num_layers": 5}))
    search = ("--prune-target-params", "1M", "--prune-max-depth-pruning", 0.5)
    search += ("--prune-max-width-pruning", 0)
    tools.run_stages(
        ("prune", flags(model, tmp_path / "named", *kept, *named)),
        ("prune", flags(model, tmp_path / "searched", *kept, *search)),
    )
    for name in ("named", "searched"):
        content = json.loads((tmp_path / name / "run.json").read_text())
        layers = content["metrics"]["kept_layers"]
        assert IDENTITY not in layers
        assert len(layers) < 6
    original, pruned = (content[name]["transformer"] for name in ("pruned_from", "architecture"))
    changed = {name for name in original if original[name] != pruned[name]}
    assert changed == {"num_layers"}


def test_a_search_that_may_cut_nothing_is_refused(model, tmp_path):
    none = ("--prune-max-width-pruning", 0, "--prune-max-depth-pruning", 0)
    done = tools.run(
        "prune.py", *flags(model, tmp_path / "p", "--prune-target-params", "1M", *none), code=2
    )
    assert "smallest architecture of the search" in done.stderr
