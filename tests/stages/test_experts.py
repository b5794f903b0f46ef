"""A model with experts through the stages, half of which no token ever chooses.

Its router has two pairs of opposite rows and zeros for the other four experts: of each pair one
has a positive logit, so the two that a token chooses are never among the four. At EP=2 they are all
on the second rank.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import tools
import torch
from questions import FEW_SHOTS, write_questions
from safetensors.torch import save_file
from test_mmlu_stage import reference_answers
from test_quantized_export import TOLERANCES, decode, rounded_input, stored_tensors
from torch.nn import functional

import export
import quantize
from post_training.cli.stage import make_plan
from post_training.common.errors import UsageError
from post_training.export import readback
from post_training.models import transformers_names
from post_training.quantization import model_checks
from post_training.training import metrics as training_metrics
from post_training.training import run_folder

TOKENS = "INT8_PER_CHANNEL_PER_TOKEN_CFG"
EXPERTS, CHOSEN, IDLE = 8, 2, (4, 5, 6, 7)
EP = ("--expert-model-parallel-size", 2)
# By --moe-calibrate, and as a recipe of FP8 has it -> experts that a token reaches. Run at EP=2.
WIDER = {"all": EXPERTS, "recipe": 5}
RECIPE = """
metadata: {recipe_type: ptq}
quantize:
  algorithm: {method: max, moe_calib_experts_ratio: 0.6}
  quant_cfg:
    - {quantizer_name: '*', enable: false}
    - {quantizer_name: '*weight_quantizer', cfg: {num_bits: e4m3, axis: null}}
    - {quantizer_name: '*input_quantizer', cfg: {num_bits: e4m3, axis: null}}
    - {quantizer_name: '*output_layer*', enable: false}
    - {quantizer_name: '*router*', enable: false}
"""
# Calibrated otherwise than by maxima alone: several passes, and a search.
METHODS = ("INT4_AWQ_CFG", "auto")
# Of three layers the second is dense.
SPARSE = (0, 2)
PRUNED = {"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "hidden_size": 64}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def model(root):
    sizes = {"num_hidden_layers": 3, "num_experts": EXPERTS, "moe_intermediate_size": 128}
    sizes |= {"num_experts_per_tok": CHOSEN, "max_position_embeddings": 2048}
    model = tools.random_model(root / "source", "qwen3-moe", **sizes)
    with torch.no_grad():
        for layer in SPARSE:
            router = model.model.layers[layer].mlp.gate.weight
            router[1], router[3] = -router[0], -router[2]
            router[list(IDLE)] = 0
    model.save_pretrained(root / "source")
    return model


@pytest.fixture(scope="module")
def printed(root, model):
    """What the stages printed that ran at TP=1, after one at EP=2."""
    (root / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"line {i}: " + "some text " * 9}) for i in range(60))
    )
    (root / "questions").mkdir()
    recipe = root / "recipe.yaml"
    recipe.write_text(RECIPE)
    ids = tools.tokens()
    source = ("--pretrained-model-path", root / "source", "--fp32")
    data = ("--calib-size", 8, "--calib-max-sequence-length", 64, "--skip-generate")
    text = ("--calib-dataset-path-or-name", root / "text.jsonl")

    def quantized(name, save, *more):
        form = ("--recipe", name) if name == recipe else ("--export-quant-cfg", name)
        return ("quantize", (*source, "--save", root / save, *form, *text, *data, *more))

    def exported(name):
        return ("export", ("--load", root / name, "--export-dir", root / f"{name}_hf", "--fp32"))

    def logits(name):
        return tools.logits_job(root / f"{name}_logits", ids, "--load", root / name, "--fp32")

    fp8 = partial(quantized, "FP8_DEFAULT_CFG")
    at_two = tools.run_stages(
        fp8("EP=2", *EP),
        fp8("all", "--moe-calibrate", "all", *EP),
        quantized(recipe, "recipe", *EP),
        quantized("auto", "auto", "--auto-quantize-bits", 6, "--auto-quantize-score-size", 1, *EP),
        processes=2,
    ).stderr
    jobs = [exported(name) for name in ("EP=2", *WIDER, "auto")]
    jobs += [quantized("INT4_AWQ_CFG", "INT4_AWQ_CFG"), exported("INT4_AWQ_CFG")]
    for name in (*TOLERANCES, TOKENS):
        jobs += [quantized(name, name), logits(name), exported(name)]
    sizes = ("--prune-export-config", json.dumps(PRUNED))
    text = ("--calib-dataset", root / "text.jsonl")
    mmlu = ("--few-shots", FEW_SHOTS, "--mmlu-dataset", write_questions(root / "questions"))
    jobs += [
        ("mmlu", (*source, *mmlu, "--mmlu-output", root / "mmlu.json")),
        ("prune", (*source, "--save", root / "pruned", *sizes, *text, *data)),
        exported("pruned"),
        logits("pruned"),
    ]
    tools.write_conversations(root / "chat.jsonl")
    (root / "prompts.jsonl").write_text(json.dumps({"turns": ["What is 3 + 4?"]}) + "\n")
    training = (
        *("--finetune-data-files", root / "chat.jsonl", "--fp32", "--seq-length", 128),
        *("--train-iters", 6, "--micro-batch-size", 2, "--log-interval", 1, "--eval-iters", 0),
        *("--lr", 2e-3),
    )
    jobs += [
        ("eagle3", (*source, *training, "--save", root / "drafted")),
        ("export", ("--load", root / "drafted", "--export-dir", root / "draft_hf", "--fp32",
                    "--export-extra-modules")),
        ("validate", ("--load", root / "drafted", "--fp32", "--osl", 8, "--steps", 2,
                      "--prompts-path", root / "prompts.jsonl", "--require-identical",
                      "--validate-output", root / "validate.json")),
        ("distill", ("--load", root / "pruned", "--teacher", root / "source", *training,
                     "--save", root / "distilled")),
    ]  # fmt: skip
    return at_two + tools.run_stages(*jobs).stderr


def as_an_engine(tensors, name, bias, x):
    """What a linear gives, from its stored tensors and its rounded input."""
    stored = tensors[f"{name}.weight"]
    if stored.dtype == torch.int8:
        scale = x.abs().amax(-1, keepdim=True) / 127
        rounded = (x / scale).round() * scale
        return functional.linear(rounded, stored.float() * tensors[f"{name}.weight_scale"], bias)
    x = rounded_input(
        x, tensors[f"{name}.input_scale"].float(), is_fp8=stored.dtype == torch.float8_e4m3fn
    )
    return functional.linear(x, decode(tensors, name), bias)


def experts_as_an_engine(tensors, prefix, own, hidden, chosen, weights):
    """What a layer's experts give, from the stored tensors of each and its rounded inputs.

    Args:
        own: names of an expert's gate, up and down.
        hidden: [tokens, hidden size].
        chosen: experts of each token, [tokens, k]; ``weights`` alike.
    """

    def linear(name, x):
        return as_an_engine(tensors, name, None, x)

    output = torch.zeros_like(hidden)
    for expert in range(EXPERTS):
        rows, place = torch.where(chosen == expert)
        if len(rows):
            names = [f"{prefix}.{expert}.{each}" for each in own]
            gate, up = (linear(name, hidden[rows]) for name in names[:2])
            result = linear(names[2], functional.silu(gate) * up)
            output.index_add_(0, rows, result * weights[rows, place, None])
    return output


def transformers_name(name):
    """Mixtral's and MiniMax's names of files -> those that transformers gives to modules."""
    parts = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    return ".".join(parts.get(part, part) for part in name.split("."))


def engine_logits(folder, ids):
    """transformers' model with the folder's weights and rounded inputs."""
    from transformers import AutoModelForCausalLM

    config = transformers_names.config(folder)
    del config.quantization_config
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    granite = config.model_type.startswith("granite")
    renamed = granite_name if granite else transformers_name
    own = ("w1", "w3", "w2") if granite else ("gate_proj", "up_proj", "down_proj")
    tensors = {renamed(name): tensor for name, tensor in stored_tensors(folder).items()}
    with torch.no_grad():
        for name, value in (*reference.named_buffers(), *reference.named_parameters()):
            if name in tensors and not name.endswith("weight"):  # biases, routers' included
                value.copy_(tensors[name])
        for name, module in reference.named_modules():
            if f"{name}.weight_scale" in tensors:
                module.forward = partial(as_an_engine, tensors, name, module.bias)
            elif f"{name}.weight" in tensors:
                module.weight.copy_(tensors[f"{name}.weight"])
            if name.endswith(("mlp.experts", "block_sparse_moe.experts")):
                module.forward = partial(experts_as_an_engine, tensors, name, own)
    return tools.transformers_logits(reference, ids)


def granite_name(name):
    return name.replace(".router.layer.", ".router.")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, name: t.pop(f"{name}.input_scale"), "up_proj.input_scale is missing"),
        (lambda t, name: t[f"{name}.weight_scale"].zero_(), "weight_scale is not finite and pos"),
        (lambda t, name: t[f"{name}.input_scale"].mul_(2), "computed as one, but differ in input"),
    ],
)
def test_an_expert_with_a_damaged_scale_is_seen(root, printed, tmp_path, change, message):
    source, name = root / "FP8_DEFAULT_CFG_hf", "model.layers.2.mlp.experts.5.up_proj"
    assert readback.Folder(source).problems() == []
    shutil.copytree(source, tmp_path / "damaged")
    tensors = stored_tensors(source)
    change(tensors, name)
    save_file(tensors, tmp_path / "damaged" / "model.safetensors")
    found = readback.Folder(tmp_path / "damaged").problems()
    assert any(message in each and ".experts.5." in each for each in found), found


@pytest.mark.parametrize("name", [*TOLERANCES, TOKENS])
def test_engine_logits_equal_the_quantized_models(root, printed, name):
    actual = engine_logits(root / f"{name}_hf", tools.tokens())
    wanted = tools.read_logits(root / f"{name}_logits")
    assert (actual - wanted).abs().mean() < TOLERANCES.get(name, 0.01) * wanted.std()


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_routers_are_named_as_not_quantized(root, printed, name):
    quantization = json.loads((root / f"{name}_hf" / "hf_quant_config.json").read_text())
    excluded = quantization["quantization"]["exclude_modules"]
    assert {f"model.layers.{layer}.mlp.gate" for layer in SPARSE} <= set(excluded)


def calibration_of(root, name):
    return json.loads((root / name / "run.json").read_text())["metrics"]["calibration"]


@pytest.mark.parametrize("name", [*TOLERANCES, "EP=2", *METHODS])
def test_experts_without_tokens_are_counted_and_have_scales(root, printed, name):
    used = calibration_of(root, name)
    for layer in SPARSE:
        tokens = used["expert_tokens"][str(layer)]
        assert sum(tokens) == CHOSEN * used["tokens"], "each token chooses two, in every pass"
        assert [n for n, count in enumerate(tokens) if count == 0] == list(IDLE)
    words = " ".join(printed.replace("│", " ").split())
    assert "8 of 16 got no calibration token" in words and "4: 4-7" in words
    tensors = stored_tensors(root / f"{name}_hf")
    for layer in SPARSE:
        for part in ("gate_proj", "up_proj", "down_proj"):
            names = [f"model.layers.{layer}.mlp.experts.{n}.{part}" for n in range(EXPERTS)]
            if name != "INT4_AWQ_CFG":  # inputs in 16 bits
                inputs = {float(tensors[f"{each}.input_scale"]) for each in names}
                assert len(inputs) == 1 and inputs.pop() > 0
            assert all((tensors[f"{each}.weight_scale"].float() > 0).any() for each in names)


@pytest.mark.parametrize("mode", WIDER)
def test_each_token_reaches_as_many_experts_as_are_asked_for(root, printed, mode):
    routed, used = calibration_of(root, "EP=2"), calibration_of(root, mode)
    assert used["expert_tokens"] == routed["expert_tokens"], "the router's choice is its own"
    for layer, tokens in used["expert_tokens"].items():
        both = [a + b for a, b in zip(tokens, used["expert_tokens_added"][layer], strict=True)]
        assert sum(both) == WIDER[mode] * used["tokens"]
        assert max(both) <= used["tokens"], "no expert gets a token twice"
        assert any(both[number] for number in IDLE)
    assert not routed["expert_tokens_added"]


def test_wider_calibration_leaves_what_the_layers_give_and_raises_scales_of_experts(root, printed):
    routed, some, every = (
        stored_tensors(root / f"{name}_hf") for name in ("EP=2", "recipe", "all")
    )
    raised = 0
    for name, tensor in routed.items():
        if "experts" in name and name.endswith("down_proj.input_scale"):
            assert tensor <= some[name] <= every[name]
            raised += tensor < every[name]
        else:  # inputs of later layers are those of the routed model
            assert torch.equal(tensor.float(), some[name].float()), name
            assert torch.equal(tensor.float(), every[name].float()), name
    assert raised in (EXPERTS, 2 * EXPERTS), "of one layer at least"


def test_quantized_at_ep_2_it_is_exported_as_at_ep_1(root, printed):
    covered = [
        json.loads((root / name / "run.json").read_text())["metrics"]["coverage"]
        for name in ("FP8_DEFAULT_CFG", "EP=2")
    ]
    assert covered[0] == covered[1], "the experts of both ranks are counted"
    one, two = (stored_tensors(root / f"{name}_hf") for name in ("FP8_DEFAULT_CFG", "EP=2"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        if name.endswith("input_scale"):
            torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=0)
        else:
            assert torch.equal(two[name].float(), tensor.float()), name


def refusal(monkeypatch, stage, *flags):
    """What the checks of a stage say; four processes are planned."""
    monkeypatch.setenv("MLM_PLANNED_PROCESSES", "4")
    with pytest.raises(UsageError) as error:
        make_plan(stage, [*map(str, flags), "--check"])
    return str(error.value)


def test_export_at_ep_2_is_refused_before_anything_is_loaded(root, printed, monkeypatch):
    flags = ("--load", root / "EP=2", "--export-dir", root / "refused", *EP)
    said = refusal(monkeypatch, export.STAGE, *flags)
    assert "EP=2" in said and "export at TP=1 EP=1" in said


def test_mmlu_answers_are_those_of_transformers(root, model, printed):
    report = json.loads((root / "mmlu.json").read_text())
    expected = reference_answers(SimpleNamespace(questions=root / "questions", model=model))
    assert report["answers"] == expected


def test_pruned_experts_give_transformers_the_same_logits(root, printed):
    from transformers import AutoModelForCausalLM

    config = json.loads((root / "pruned_hf" / "config.json").read_text())
    assert config["num_local_experts"] == PRUNED["num_moe_experts"]
    assert config["moe_intermediate_size"] == PRUNED["moe_ffn_hidden_size"]
    assert config["hidden_size"] == PRUNED["hidden_size"]
    model = AutoModelForCausalLM.from_pretrained(root / "pruned_hf", dtype=torch.float32).eval()
    wanted = tools.transformers_logits(model, tools.tokens())
    assert wanted.std() > 0.3
    difference = (tools.read_logits(root / "pruned_logits") - wanted).abs().max()
    assert difference < 1e-4


@pytest.mark.parametrize("name", ["drafted", "distilled"])
def test_training_on_a_model_with_experts_lowers_the_loss(root, printed, name):
    logged = training_metrics.read(root / name / run_folder.FOLDER)
    losses = [line["loss"] for line in logged if line["kind"] == "train"]
    assert len(losses) == 6
    assert losses[-1] < losses[0]


def test_the_draft_of_a_model_with_experts_is_exported_and_agrees_with_greedy_decoding(
    root, printed
):
    assert (root / "draft_hf" / "model.safetensors").is_file()
    acceptance = json.loads((root / "validate.json").read_text())["acceptance"]
    assert acceptance["identical_answers"] == acceptance["answers"] > 0


def test_what_quantize_cannot_do_with_experts_is_refused_or_noted(root, model, monkeypatch):
    save = ("--pretrained-model-path", root / "source", "--save", root / "refused")
    both = (*EP, "--tensor-model-parallel-size", 2)
    said = refusal(monkeypatch, quantize.STAGE, *save, *both)
    assert "TP=2 EP=2" in said and "ModelOpt" in said
    for word in ("none", "0", "1.5", "nan"):
        said = refusal(monkeypatch, quantize.STAGE, *save, "--moe-calibrate", word)
        assert f"--moe-calibrate {word}" in said and "all, or the share" in said
    said = refusal(monkeypatch, quantize.STAGE, *save, "--export-quant-cfg", "int4_awq_full")
    assert "awq_full fails at an expert that gets no token" in said
    searched = ("--export-quant-cfg", "auto", "--auto-quantize-formats", "nvfp4_awq_clip", "fp8")
    said = refusal(monkeypatch, quantize.STAGE, *save, *searched)
    assert "awq_clip fails at an expert that gets no token" in said
    model_checks.check_clipping("a recipe", "awq_lite+max", 8)
    with pytest.raises(UsageError, match="fails at an expert"):
        model_checks.check_clipping("a recipe", "max+awq_clip", 8)
    plan = make_plan(quantize.STAGE, list(map(str, (*save, "--moe-calibrate", 0.25))))
    assert "changes nothing: the router sends each token to 2 of 8" in plan.options.notices[-1]
    tools.random_model(root / "dense", "qwen3")
    dense = ("--pretrained-model-path", root / "dense", "--save", root / "refused")
    plan = make_plan(quantize.STAGE, list(map(str, (*dense, "--moe-calibrate", "all"))))
    assert "unused, as the model has no experts: --moe-calibrate" in plan.options.notices
