"""Families whose layers differ from Llama's through the stages that train, and what is carried.

Logits at every layout, the exact round trip, greedy tokens and exported formats are in tests of all
families; what a family is refused for is here too.
"""

from __future__ import annotations

import json
import shutil

import pytest
import tools
import torch
from safetensors.torch import load_file, save_file

from post_training.export import readback
from post_training.export.carried import Carried
from post_training.training import metrics as training_metrics
from post_training.training import run_folder

TRAINED = ("glm4-moe", "olmo2", "minimax-m2")
FUSED = ("gemma3", "glm4-moe", "minimax-m2")  # norms before attention and MLP
LAYERS = 4
SIZES = {
    **{"hidden_size": 64, "ffn_hidden_size": 128},
    **{"moe_ffn_hidden_size": 64, "moe_shared_expert_intermediate_size": 128},
}
PRUNED = ("--prune-export-config", '{"hidden_size": 64}')


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("stages")


@pytest.fixture(scope="module")
def further(root):
    """GLM-4.5 with a layer that predicts a further token, as published: its tensors by name."""
    folder = root / "glm4-moe"
    tools.random_model(folder, "glm4-moe", torch.bfloat16, num_hidden_layers=LAYERS)
    tensors = load_file(folder / "model.safetensors")
    last, own = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    layer = {name.replace(last, own): -value for name, value in tensors.items() if last in name}
    layer[f"{own}eh_proj.weight"] = torch.randn(128, 256).bfloat16()
    layer[f"{own}shared_head.norm.weight"] = torch.randn(128).bfloat16()
    layer[f"{own}shared_head.head.weight"] = torch.randn(512, 128).bfloat16()
    save_file({**tensors, **layer}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    return layer


@pytest.fixture(scope="module")
def done(root, further):
    """Everything that runs in one process."""
    text = tools.write_texts(root / "text.jsonl")
    tools.write_conversations(root / "chat.jsonl")
    (root / "prompts.jsonl").write_text(json.dumps({"turns": ["What is 3 + 4?"]}) + "\n")
    training = training_flags(root)
    jobs = []
    for family in {*TRAINED, *FUSED} - {"glm4-moe"}:
        tools.random_model(root / family, family, torch.bfloat16, num_hidden_layers=LAYERS)
    for family in FUSED:
        flags = ("--pretrained-model-path", root / family, "--fp32", "--export-default-te-spec")
        jobs.append(tools.logits_job(root / f"{family} fused", tools.tokens(), *flags))
    for family in TRAINED:
        folder, work = root / family, root / f"{family} fp8"
        source = ("--pretrained-model-path", folder)
        drafted = root / f"{family} drafted"
        quantized = ("--save", work, "--export-quant-cfg", "FP8_DEFAULT_CFG", "--skip-generate")
        data = ("--calib-dataset-path-or-name", text, "--calib-size", 8)
        jobs += [
            ("quantize", (*source, *quantized, *data, "--calib-max-sequence-length", 64)),
            ("export", ("--load", work, "--export-dir", root / f"{family} hf")),
            ("eagle3", (*source, *training, "--save", drafted)),
            ("validate", ("--load", drafted, "--fp32", "--osl", 8, "--steps", 2,
                          "--prompts-path", root / "prompts.jsonl", "--require-identical",
                          "--validate-output", root / f"{family} validate.json")),
            ("distill", ("--load", work, "--teacher", folder, *training,
                         "--save", root / f"{family} distilled")),
        ]  # fmt: skip
    sizes = ("--prune-export-config", json.dumps(SIZES), "--calib-dataset", text)
    data = ("--calib-size", 4, "--calib-max-sequence-length", 64, "--skip-generate")
    source = ("--pretrained-model-path", root / "glm4-moe", "--fp32")
    jobs += [
        ("prune", (*source, "--save", root / "pruned", *sizes, *data)),
        ("export", ("--load", root / "pruned", "--fp32", "--export-dir", root / "pruned hf")),
        tools.logits_job(root / "pruned logits", tools.tokens(), "--load", root / "pruned",
                         "--fp32"),
    ]  # fmt: skip
    tuned = ("--pretrained-model-path", root / "olmo2", *training, "--save", root / "tuned")
    return tools.run_stages(*jobs, ("finetune", tuned)).stderr


def training_flags(root):
    return (
        *("--finetune-data-files", root / "chat.jsonl", "--fp32", "--seq-length", 128),
        *("--train-iters", 6, "--micro-batch-size", 2, "--log-interval", 1, "--eval-iters", 0),
        *("--lr", 2e-3),
    )


def losses(folder, name="loss"):
    logged = training_metrics.read(folder / run_folder.FOLDER)
    return [line[name] for line in logged if line["kind"] == "train"]


def test_norms_over_all_heads_are_trained_on_two_ranks_as_on_one(root, done, tmp_path):
    sizes = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
    source = ("--pretrained-model-path", root / "olmo2", *training_flags(root))
    tools.run_stages(("finetune", (*source, "--save", tmp_path / "two", *sizes)), processes=2)
    # A step of this size makes more of a rounding: gradients are compared before the first.
    for name, steps in (("loss", 6), ("grad_norm", 1)):
        one, two = losses(root / "tuned", name), losses(tmp_path / "two", name)
        assert two[:steps] == pytest.approx(one[:steps], rel=1e-5 if steps == 1 else 1e-3), name


@pytest.mark.parametrize("family", FUSED)
def test_transformer_engines_layers_compute_the_same(root, done, family):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.float32).eval()
    wanted = tools.transformers_logits(model, tools.tokens())
    assert (tools.read_logits(root / f"{family} fused") - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("family", TRAINED)
def test_a_draft_is_trained_and_decodes_as_the_model_alone(root, done, family):
    found = losses(root / f"{family} drafted")
    assert len(found) == 6 and found[-1] < found[0]
    acceptance = json.loads((root / f"{family} validate.json").read_text())["acceptance"]
    assert acceptance["identical_answers"] == acceptance["answers"] > 0


@pytest.mark.parametrize("family", TRAINED)
def test_a_quantized_model_is_distilled_towards_its_original(root, done, family):
    found = losses(root / f"{family} distilled")
    assert len(found) == 6 and 0 < found[0] < 0.05, "FP8 is near to what it was made of"
    assert found[-1] < found[1], "what the first step added is taken away again"


def test_layers_for_further_tokens_travel_with_glm(root, further, done):
    stored = dict(tools.tensors(root / "glm4-moe hf"))
    own = f"model.layers.{LAYERS}."
    assert {name for name in stored if name.startswith(own)} == further.keys()
    for name, tensor in further.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    quantization = json.loads((root / "glm4-moe hf" / "hf_quant_config.json").read_text())
    assert f"{own}*" in quantization["quantization"]["exclude_modules"]
    # What the export itself looks at before its folder gets its name.
    of_source = Carried(root / "glm4-moe fp8" / "huggingface", frozenset(further))
    assert of_source.problems(readback.Folder(root / "glm4-moe hf")) == []
    lost, changed = f"{own}eh_proj.weight", f"{own}shared_head.norm.weight"
    damaged = root / "glm4-moe damaged"
    shutil.copytree(root / "glm4-moe hf", damaged)
    tensors = {name: each for name, each in stored.items() if name != lost}
    save_file({**tensors, changed: tensors[changed] + 1}, damaged / "model.safetensors")
    found = of_source.problems(readback.Folder(damaged))
    assert found == [f"{name} is not what the source has" for name in (lost, changed)]


def test_pruned_glm_computes_as_in_transformers_and_predicts_no_further_tokens(root, done):
    from transformers import AutoModelForCausalLM

    folder = root / "pruned hf"
    config = json.loads((folder / "config.json").read_text())
    assert (config["num_nextn_predict_layers"], config["hidden_size"]) == (0, 64)
    assert (config["moe_intermediate_size"], config["n_shared_experts"]) == (64, 2)
    names = {name for name, _ in tools.tensors(folder)}
    assert not any(name.startswith(f"model.layers.{LAYERS}.") for name in names)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = tools.transformers_logits(model, tools.tokens())
    assert wanted.std() > 0.3
    assert (tools.read_logits(root / "pruned logits") - wanted).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("family", "stage", "flags", "reason"),
    [
        ("olmo2", "prune", PRUNED, "norms"),
        ("minimax-m2", "prune", PRUNED, "norms of all heads"),
        ("olmo2", "convert", ("--export-default-te-spec",), "without norms before them"),
        ("olmo2", "quantize", ("--export-quant-cfg", "INT4_AWQ_CFG"), "have no norm before them"),
    ],
)
def test_what_does_not_work_is_refused_before_anything_is_loaded(
    root, further, tmp_path, family, stage, flags, reason
):
    source = ("--pretrained-model-path", root / family, "--save", tmp_path / "refused")
    done = tools.run(f"{stage}.py", *source, *flags, "--check", code=2)
    assert reason in " ".join(done.stderr.split())
