"""Every family, quantized and exported, gives an engine the logits of the quantized model.

Models whose experts transformers has in one tensor are in test_experts.py and
test_latent_attention.py, but for what the export itself reads back and for those of ``MORE``.
"""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import tools
import torch
from decoded import transformers_model
from test_compressed_tensors import decode as decode_integers
from test_experts import engine_logits as engine_logits_of_experts
from test_quantized_export import (
    TOLERANCES,
    decode,
    engine_logits,
    rounded_input,
    stored_tensors,
)

from post_training.export.dividing import Dividing
from post_training.export.joining import Joining

# One matrix for query, key and value: scales of blocks are joined too.
READ = [name for name, family in tools.FAMILIES.items() if not family.not_quantized]
TARGET = {"gemma3": "trtllm"}  # vLLM loads no Gemma 3 in ModelOpt's layout
INTEGERS = "INT4_BLOCKWISE_WEIGHT_ONLY_CFG"
MORE = ("glm4-moe", "olmo2", "olmo3", "minimax-m2", "gemma3", "qwen3-next", "granite-moe-shared")
FORMATS = (
    dict.fromkeys(READ, ("FP8_DEFAULT_CFG",))
    | {"phi3": ("NVFP4_DEFAULT_CFG",)}
    | dict.fromkeys(MORE, (*TOLERANCES, INTEGERS))
)
SIMULATED = ("qwen3", "qwen3-moe", "phi3")  # --export-vllm-fq: plain, with experts, joined
DENSE = [name for name in READ if "experts" not in tools.FAMILIES[name].parts]
EXPORTS = [(family, name) for family, names in FORMATS.items() for name in names]
FLOATS = [each for each in EXPORTS if each[1] != INTEGERS]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folder, and the transformers model of each family."""
    root = tmp_path_factory.mktemp("families")
    (root / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"line {i}: " + "some text " * 9}) for i in range(60))
    )
    models, jobs = {}, []
    for family in FORMATS:
        models[family] = tools.random_model(root / f"{family} source", family, num_hidden_layers=4)
    for family, name in EXPORTS:
        work = root / f"{family} {name}"
        jobs += [
            (
                "quantize",
                (
                    *("--pretrained-model-path", root / f"{family} source", "--save", work),
                    *("--export-quant-cfg", name, "--skip-generate", "--fp32"),
                    *("--target", "vllm" if name == INTEGERS else TARGET.get(family, "vllm")),
                    *("--calib-dataset-path-or-name", root / "text.jsonl"),
                    *("--calib-size", 8, "--calib-max-sequence-length", 64),
                ),
            ),
            tools.logits_job(
                root / f"{family} {name} logits", tools.tokens(), "--load", work, "--fp32"
            ),
            ("export", ("--load", work, "--export-dir", f"{work} hf", "--fp32")),
        ]
        if family in SIMULATED:
            folder = ("--export-dir", f"{work} simulated")
            jobs.append(("export", ("--load", work, *folder, "--export-vllm-fq", "--fp32")))
    tools.run_stages(*jobs)
    return root, models


@pytest.mark.parametrize(("family", "name"), [each for each in FLOATS if each[0] in DENSE])
def test_engine_logits_equal_the_quantized_models(exported, family, name):
    root, models = exported
    reference = copy.deepcopy(models[family])
    actual, quantized = engine_logits(root / f"{family} {name} hf", reference, tools.tokens())
    wanted = tools.read_logits(root / f"{family} {name} logits")
    plain = ("in_proj_b", "in_proj_a")  # of gated delta nets
    linears = [
        name
        for name, module in reference.named_modules()
        if isinstance(module, torch.nn.Linear) and not name.endswith(plain)
    ]
    assert quantized == len(linears) - 1, "all but the output layer"
    assert (actual - wanted).abs().mean() < tolerance(models[family], name, wanted)


def tolerance(model, name, wanted):
    """Of the mean difference.

    On a GPU sums have another order than in the reference: values near a tie are rounded to the
    other side, and so is what follows from them. That stays far below what quantization changes.
    """
    if not torch.cuda.is_available():
        return TOLERANCES[name] * wanted.std()
    return 0.25 * (tools.transformers_logits(model, tools.tokens()) - wanted).abs().mean()


EXPERTS = [each for each in FLOATS if each[0] not in DENSE]


@pytest.mark.parametrize(("family", "name"), [each for each in EXPERTS if each[0] in MORE])
def test_engine_logits_with_experts_equal_the_quantized_models(exported, family, name):
    root, models = exported
    actual = engine_logits_of_experts(root / f"{family} {name} hf", tools.tokens())
    wanted = tools.read_logits(root / f"{family} {name} logits")
    assert (actual - wanted).abs().mean() < tolerance(models[family], name, wanted)


@pytest.mark.parametrize("family", MORE)
def test_integers_stand_for_the_quantized_models_weights(exported, family):
    root, models = exported
    name = f"{family} {INTEGERS}"
    plain = transformers_model(root / f"{name} hf", root / f"{name} plain", decode_integers)
    actual = tools.transformers_logits(plain, tools.tokens())
    wanted = tools.read_logits(root / f"{name} logits")
    original = tools.transformers_logits(models[family], tools.tokens())
    assert (actual - wanted).abs().max() < 1e-3
    assert (original - wanted).abs().mean() > 0.01 * wanted.std()


@pytest.mark.parametrize(("family", "name"), EXPERTS)
def test_each_expert_of_an_exported_model_has_its_scales(exported, family, name):
    root, _ = exported
    names = {each for each, _ in tools.tensors(root / f"{family} {name} hf")}
    linears = [n.removesuffix("weight") for n in names if ".experts." in n and n.endswith("weight")]
    config = tools.FAMILIES[family].tiny_config(num_hidden_layers=4)
    values = tools.FAMILIES[family].read(config).resolved()
    pattern = values["hybrid_layer_pattern"]
    layers = pattern.count("E") if pattern else sum(values["moe_layer_freq"])
    matrices = 3 if values["gated_linear_unit"] else 2
    assert len(linears) == matrices * values["num_moe_experts"] * layers
    for linear in linears:
        assert {f"{linear}weight_scale", f"{linear}input_scale"} <= names


def test_engine_logits_of_experts_that_transformers_has_in_one_tensor(exported):
    root, models = exported
    folder = root / "llama4 FP8_DEFAULT_CFG hf"
    tensors = stored_tensors(folder)

    def linear(name, x):
        x = rounded_input(x, tensors[f"{name}.input_scale"].float(), is_fp8=True)
        return torch.nn.functional.linear(x, decode(tensors, name))

    def experts(prefix, count, hidden):
        found = []
        for number, x in enumerate(hidden.chunk(count)):
            name = f"{prefix}.{number}"
            gate, up = (linear(f"{name}.{part}_proj", x) for part in ("gate", "up"))
            found.append(linear(f"{name}.down_proj", torch.nn.functional.silu(gate) * up))
        return torch.cat(found)

    sparse = 0
    for name, module in models["llama4"].named_modules():
        if name.endswith("feed_forward.experts"):
            module.forward = partial(experts, name, module.num_experts)
            sparse += 1
    actual, quantized = engine_logits(folder, models["llama4"], tools.tokens())
    # Attention, and in the others of the four layers a dense MLP or a shared expert.
    assert (sparse, quantized) == (2, 4 * (4 + 3))
    wanted = tools.read_logits(root / "llama4 FP8_DEFAULT_CFG logits")
    assert (actual - wanted).abs().mean() < TOLERANCES["FP8_DEFAULT_CFG"] * wanted.std()


@pytest.mark.parametrize("family", SIMULATED)
def test_a_folder_for_simulation_has_the_weights_and_maxima_of_the_packed_one(exported, family):
    root, _ = exported
    (name,) = FORMATS[family]
    packed, plain = (
        stored_tensors(root / f"{family} {name} {kind}") for kind in ("hf", "simulated")
    )
    kinds = ("weight_scale", "weight_scale_2", "input_scale")
    assert plain.keys() == {each for each in packed if not each.endswith(kinds)}
    for each, value in plain.items():
        module, _, kind = each.rpartition(".")
        wanted = decode(packed, module) if kind == "weight" else packed[each]
        torch.testing.assert_close(value, wanted.float(), rtol=1e-6, atol=0)
    simulated = root / f"{family} {name} simulated"
    state = torch.load(simulated / "quantizer_state.pth", weights_only=True)
    for each, value in packed.items():
        if each.endswith("input_scale"):
            largest = 448 if name.startswith("FP8") else 6 * 448
            maximum = state[each.replace("input_scale", "input_quantizer._amax")]
            torch.testing.assert_close(maximum / largest, value.reshape(maximum.shape))
    assert not (simulated / "hf_quant_config.json").exists()


def test_rows_are_divided_in_the_order_of_the_files():
    dividing = Dividing({"in_proj": {"first": [2, 0], "second": range(1, 2)}})
    weight = torch.arange(6.0).reshape(3, 2)
    group = {
        "attn.in_proj.weight": weight,
        "attn.in_proj.input_scale": torch.tensor(2.0),
        "attn.out_proj.weight": weight,
    }
    found = dividing.tensors(group)
    assert found.keys() == {
        *("attn.first.weight", "attn.first.input_scale", "attn.out_proj.weight"),
        *("attn.second.weight", "attn.second.input_scale"),
    }
    assert torch.equal(found["attn.first.weight"], weight[[2, 0]])
    assert torch.equal(found["attn.second.weight"], weight[1:2])
    assert dividing.modules("attn.in_proj.") == ["attn.first.", "attn.second."]
    with pytest.raises(ValueError, match="has 2 rows, the layer 3"):
        dividing.tensors({"attn.in_proj.weight_scale": torch.ones(2)})


def test_parts_with_different_scales_are_not_joined():
    joining = Joining({"gate_up_proj": {"gate_proj": 2, "up_proj": 2}})
    parts = {
        f"mlp.{part}_proj.{kind}": value
        for part in ("gate", "up")
        for kind, value in (("weight", torch.ones(2, 3)), ("weight_scale", torch.tensor(2.0)))
    }
    joined = joining.tensors(parts)
    assert joined.keys() == {"mlp.gate_up_proj.weight", "mlp.gate_up_proj.weight_scale"}
    assert joined["mlp.gate_up_proj.weight"].shape == (4, 3)
    parts["mlp.up_proj.weight_scale"] = torch.tensor(3.0)
    with pytest.raises(ValueError, match="gate_up_proj differ in weight_scale"):
        joining.tensors(parts)
