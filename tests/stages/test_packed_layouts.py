"""Packed weights (``--compress``) at other tensor-parallel sizes than that of their saving."""

from __future__ import annotations

import json

import pytest
import tools
import torch

TP = ("--tensor-model-parallel-size", 2)
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64}
# Linears whose parts are divided one by one: gate and up, and the inputs of recurrences.
MODELS = {
    "qwen3": SIZES,
    "qwen3.5": {"num_hidden_layers": 2, "full_attention_interval": 2},
    "nemotron-h": {"hybrid_override_pattern": "M-", "mamba_num_heads": 16, "mamba_head_dim": 32},
}
RECIPE = """
metadata: {recipe_type: ptq}
quantize:
  algorithm: max
  quant_cfg:
    - {quantizer_name: '*', enable: false}
    - {quantizer_name: '*mlp*weight_quantizer', cfg: {num_bits: 8, axis: 0}}
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    for family, sizes in MODELS.items():
        tools.random_model(root / family, family, torch.bfloat16, **sizes)
    tools.write_texts(root / "text.jsonl")
    return root


def flags(work, save, *more, family="qwen3"):
    return (
        *("--pretrained-model-path", work / family, "--save", save, "--skip-generate"),
        *("--calib-dataset-path-or-name", work / "text.jsonl", "--calib-size", 2),
        *("--calib-max-sequence-length", 64, "--compress", *more),
    )


@pytest.fixture(scope="module")
def packed(work):
    """Every model, packed at one and at two ranks, and exported."""
    quantize = ("--export-quant-cfg", "NVFP4_DEFAULT_CFG")

    def jobs(size, *more):
        for family in MODELS:
            given = flags(work, work / f"{family} {size}", *quantize, *more, family=family)
            yield "quantize", given

    tools.run_stages(*jobs("two", *TP), processes=2)
    names = [f"{family} {size}" for family in MODELS for size in ("one", "two")]
    export = [("export", ("--load", work / n, "--export-dir", work / f"{n} hf")) for n in names]
    tools.run_stages(*jobs("one"), *export)


@pytest.mark.parametrize("family", MODELS)
def test_packed_at_two_ranks_it_is_exported_as_packed_at_one(work, packed, family):
    """ModelOpt saves block scales of such linears in each rank's order."""
    one, two = (dict(tools.tensors(work / f"{family} {size} hf")) for size in ("one", "two"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        if not name.endswith("input_scale"):  # sums of another order
            assert torch.equal(value.float(), two[name].float()), name


def test_integers_are_not_packed_at_two_ranks(work, tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    for more in (("--export-quant-cfg", "int4_awq"), ("--recipe", tmp_path / "recipe.yaml")):
        given = flags(work, tmp_path / "q", *more, *TP)
        done = tools.run("quantize.py", *given, processes=2, code=1)
        assert "--compress with TP=2" in done.stderr and "TP=1" in done.stderr
        assert not (tmp_path / "q").exists()


def test_packed_integers_at_another_size_are_named(work, tmp_path):
    quantize = flags(work, tmp_path / "q", "--export-quant-cfg", "int8_weight_only")
    tools.run("quantize.py", *quantize)
    given = ("--load", tmp_path / "q", "--save", tmp_path / "again", *TP)
    job = tools.logits_job(tmp_path / "logits", tools.tokens(), *given[:2], *TP)
    done = tools.run(
        "tests/helpers/run_stages.py",
        json.dumps([[job[0], [*map(str, job[1])]]]),
        processes=2,
        code=1,
    )
    assert "does not fit this model" in done.stderr and "need its TP" in done.stderr
