"""GPTQ through the stages: closer to the model than rounding to nearest, and exported as scored."""

from __future__ import annotations

import json

import pytest
import tools
import torch
from test_compressed_tensors import SIZES, decode, engine_logits

from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.export import readback
from quantize import QuantizeOptions, check

ROUNDED = {
    "INT4_GPTQ_CFG": "INT4_BLOCKWISE_WEIGHT_ONLY_CFG",
    "INT8_GPTQ_CFG": "INT8_WEIGHT_ONLY_CFG",
}
LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
LINEARS += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
# Of each pair of opposite routers one is positive, so the experts without one, all on the second
# of two ranks, are never among the two that a token chooses.
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
IDLE = 7
SPARSE = 0  # the other layer is dense


def words(seed):
    """80 texts of 80 random characters."""
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(32, 127, (80, 80), generator=generator).tolist()
    return ["".join(map(chr, row)) for row in letters]


def held_out():
    """Token ids [8, 48] of the kind of text that was calibrated on."""
    rows = tools.chat_tokenizer()(words(4)[:8])["input_ids"]
    return torch.tensor([row[:48] for row in rows])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of checkpoints and exports, and logits: of the plain model and of each format."""
    root = tmp_path_factory.mktemp("gptq")
    text = root / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": row}) for row in words(3)))
    tools.random_model(root / "plain", "llama3", **SIZES, tie_word_embeddings=False)
    moe = tools.random_model(root / "moe", "qwen3-moe", **SIZES, **EXPERTS)
    with torch.no_grad():
        router = moe.model.layers[SPARSE].mlp.gate.weight
        router[1], router[3] = -router[0], -router[2]
        router[4:] = 0
    moe.save_pretrained(root / "moe")
    ids = held_out()

    def quantize(name, save, *more, source="plain"):
        flags = ("--pretrained-model-path", root / source, "--fp32", "--export-quant-cfg", name)
        data = ("--calib-dataset-path-or-name", text, "--calib-max-sequence-length", 64)
        return (
            "quantize",
            (*flags, *data, "--calib-size", 16, "--skip-generate", "--save", root / save, *more),
        )

    def finish(name):
        load = ("--load", root / name, "--fp32")
        return [
            tools.logits_job(root / f"{name} logits", ids, *load),
            ("export", (*load, "--export-dir", root / f"{name} hf")),
        ]

    plain = ("--pretrained-model-path", root / "plain", "--fp32")
    one = [tools.logits_job(root / "plain logits", ids, *plain)]
    for name in (*ROUNDED, *ROUNDED.values()):
        one += [quantize(name, name), *finish(name)]
    ep = ("INT4_GPTQ_CFG", "EP=2", "--expert-model-parallel-size", 2)
    tools.run_stages(quantize("INT4_GPTQ_CFG", "DP=2"), processes=2)
    tools.run_stages(
        quantize(*ep, source="moe"),
        quantize(ep[0], "all", *ep[2:], "--moe-calibrate", "all", source="moe"),
        processes=2,
    )
    tools.run_stages(*one, *finish("DP=2"), *finish("EP=2"), finish("all")[1])
    return root


def stored(root, name):
    return dict(tools.tensors(root / f"{name} hf"))


def gptq_of(root, name):
    return json.loads((root / name / "run.json").read_text())["metrics"]["calibration"]["gptq"]


def divergence(root, name):
    """KL divergence of the plain model's next token to the quantized model's, nats a token."""
    plain, other = (
        tools.read_logits(root / f"{each} logits").log_softmax(-1) for each in ("plain", name)
    )
    return float((plain.exp() * (plain - other)).sum(-1).mean())


@pytest.mark.parametrize("name", ROUNDED)
def test_it_is_closer_to_the_model_than_rounding_to_nearest(root, name):
    assert 0 < divergence(root, name) < divergence(root, ROUNDED[name])
    done = gptq_of(root, name)
    assert done["linears"] == 8
    assert done["rounded_to_nearest"] == []
    assert 0 < done["error_ratio"] < 0.95


@pytest.mark.parametrize("name", [*ROUNDED, "DP=2", "EP=2"])
def test_the_decoded_export_and_transformers_compute_the_quantized_model(root, name):
    from transformers import AutoModelForCausalLM

    ids, wanted = held_out(), tools.read_logits(root / f"{name} logits")
    folder = root / f"{name} hf"
    if name != "EP=2":  # transformers keeps the experts of a layer in one tensor
        assert (engine_logits(folder, "llama3", ids) - wanted).abs().max() < 1e-4
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        assert not any(report.values())
        logits = tools.transformers_logits(model.eval(), ids)
        assert (logits - wanted).abs().max() < 1e-4
    assert readback.Folder(folder).problems() == []


@pytest.mark.parametrize("name", ROUNDED)
def test_every_linear_has_other_codes_than_rounding_gives(root, name):
    found, rounded = stored(root, name), stored(root, ROUNDED[name])
    assert found.keys() == rounded.keys()
    for layer in range(SIZES["num_hidden_layers"]):
        for linear in LINEARS:
            module = f"model.layers.{layer}.{linear}"
            assert not torch.equal(decode(found, module), decode(rounded, module))
    for key in found:
        if "norm" in key or "embed" in key or "lm_head" in key:
            assert torch.equal(found[key], rounded[key])


def test_replicas_add_up_their_hessians(root):
    """Sums of another order move a few codes, which moves some after them."""
    one, two = stored(root, "INT4_GPTQ_CFG"), stored(root, "DP=2")
    assert gptq_of(root, "DP=2")["linears"] == 8
    module = "model.layers.0.self_attn.q_proj"
    same = decode(one, module) == decode(two, module)
    assert same.float().mean() > 0.98
    assert divergence(root, "DP=2") < divergence(root, ROUNDED["INT4_GPTQ_CFG"])


def test_an_expert_with_too_few_tokens_is_rounded_to_nearest_and_named(root):
    done = gptq_of(root, "EP=2")
    idle = [name for name in done["rounded_to_nearest"] if "EP rank 1" in name]
    assert len(idle) == 4 * 2
    assert done["linears"] + len(done["rounded_to_nearest"]) == (2 + 2 * 8) + 4
    assert done["linears"] >= 2 + 2 + 4
    found, source = stored(root, "EP=2"), dict(tools.tensors(root / "moe"))
    name = f"model.layers.{SPARSE}.mlp.experts.{IDLE}.down_proj"
    scale = found[f"{name}.weight_scale"].float().repeat_interleave(128, 1)
    nearest = (source[f"{name}.weight"] / scale).round().clamp(-8, 7) * scale
    assert torch.allclose(decode(found, name), nearest)


def test_experts_that_no_token_chooses_are_quantized_from_tokens_that_reach_them(root):
    done, routed = gptq_of(root, "all"), gptq_of(root, "EP=2")
    assert not [name for name in done["rounded_to_nearest"] if "EP rank 1" in name]
    assert done["linears"] > routed["linears"]
    found, nearest = stored(root, "all"), stored(root, "EP=2")
    name = f"model.layers.{SPARSE}.mlp.experts.{IDLE}.down_proj"
    assert not torch.equal(decode(found, name), decode(nearest, name))
    assert readback.Folder(root / "all hf").problems() == []


@pytest.mark.parametrize(
    ("more", "shown"),
    [
        (("--tensor-model-parallel-size", 2), "TP=2 PP=1"),
        (("--pipeline-model-parallel-size", 2), "TP=1 PP=2"),
        (("--sync-expert-weight-amax",), "--sync-expert-weight-amax"),
        (("--compress",), "--compress"),
    ],
)
def test_what_it_cannot_do_is_refused_before_the_work(tmp_path, monkeypatch, more, shown):
    monkeypatch.setenv("WORLD_SIZE", "2")
    tools.random_model(tmp_path / "model", "llama3", **SIZES)
    flags = ("--pretrained-model-path", tmp_path / "model", "--save", tmp_path / "q", "--check")
    words = [*map(str, (*flags, "--export-quant-cfg", "int4_gptq", *more))]
    with pytest.raises(UsageError) as error:
        check(arguments.parse("quantize", QuantizeOptions, words))
    assert shown in error.value.what
