"""DeepSeek's models beyond what every family is tested for: formats, scales, FP8 sources, drafts.

Logits at every layout, the exact round trip and greedy tokens are in tests of all families.
"""

from __future__ import annotations

import json
import math

import pytest
import tools
import torch
from decoded import transformers_model
from safetensors.torch import save_file
from test_compressed_tensors import decode as decode_integers
from test_experts import engine_logits
from test_quantized_export import TOLERANCES

# Sizes that every format's blocks divide.
SIZES = {
    **{"num_hidden_layers": 3, "moe_intermediate_size": 128, "kv_lora_rank": 128},
    **{"q_lora_rank": 128, "v_head_dim": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16},
}
INTEGERS = ("INT8_WEIGHT_ONLY_CFG", "INT4_BLOCKWISE_WEIGHT_ONLY_CFG")
MSCALE = {"mscale": 0.707, "mscale_all_dim": 0.707}
BLOCK = 128
FURTHER = SIZES["num_hidden_layers"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("latent")


@pytest.fixture(scope="module")
def model(root):
    return tools.random_model(root / "source", "deepseek-v3", **SIZES)


@pytest.fixture(scope="module")
def scaled(root):
    """DeepSeek-V2 with the softmax scale of its own code, which transformers 5.14 leaves out.

    Its modeling_deepseek.py multiplies by mscale twice, as vLLM does; transformers does so from
    pull request 47435 on.
    """
    rope = {**tools.FAMILIES["deepseek-v2"].tiny["rope_parameters"], **MSCALE}
    found = tools.random_model(root / "scaled", "deepseek-v2", rope_parameters=rope)
    mscale = 0.1 * MSCALE["mscale_all_dim"] * math.log(rope["factor"]) + 1.0
    for layer in found.model.layers:
        attention = layer.self_attn
        attention.scaling = attention.qk_head_dim**-0.5 * mscale * mscale
    return found


@pytest.fixture(scope="module")
def fp8(root):
    """A folder as DeepSeek publishes them, and the bf16 numbers that its weights stand for."""
    tools.random_model(root / "fp8", "deepseek-v3", torch.bfloat16, **SIZES)
    stored, plain = {}, {}
    tensors = dict(tools.tensors(root / "fp8"))
    # The layer that predicts a further token, after the last.
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        tensors[name.replace(".2.", f".{FURTHER}.", 1)] = -tensors[name]
    tensors[f"model.layers.{FURTHER}.eh_proj.weight"] = torch.randn(128, 256).bfloat16()
    for name, tensor in tensors.items():
        plain[name] = stored[name] = tensor
        if (name.endswith("_proj.weight") and "eh" not in name) or "_proj_with_mqa" in name:
            rows, columns = tensor.shape
            padded = torch.zeros(-(-rows // BLOCK) * BLOCK, -(-columns // BLOCK) * BLOCK)
            padded[:rows, :columns] = tensor.float()
            blocks = padded.unfold(0, BLOCK, BLOCK).unfold(1, BLOCK, BLOCK)
            scale = blocks.abs().amax((-2, -1)) / 448
            whole = torch.kron(scale, torch.ones(BLOCK, BLOCK))[:rows, :columns]
            stored[name] = (tensor.float() / whole).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale
            plain[name] = (stored[name].float() * whole).to(torch.bfloat16)
    save_file(stored, root / "fp8" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((root / "fp8" / "config.json").read_text())
    # Kimi-K2's files have a model_type that transformers does not know.
    config["model_type"] = "kimi_k2"
    config["quantization_config"] = {
        **{"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"},
        "weight_block_size": [BLOCK, BLOCK],
    }
    (root / "fp8" / "config.json").write_text(json.dumps(config))
    return plain


@pytest.fixture(scope="module")
def done(root, model, scaled, fp8):
    """Everything that runs in one process."""
    tools.write_texts(root / "text.jsonl")
    tools.write_conversations(root / "chat.jsonl")
    (root / "prompts.jsonl").write_text(json.dumps({"turns": ["What is 3 + 4?"]}) + "\n")
    ids, jobs = tools.tokens(), []
    source = ("--pretrained-model-path", root / "source", "--fp32")
    published = ("--pretrained-model-path", root / "fp8", "--fp32")
    for name in (*TOLERANCES, *INTEGERS):
        loaded = source if name in INTEGERS else published
        jobs += [
            ("quantize", (*loaded, "--save", root / name, "--export-quant-cfg", name,
                          "--calib-dataset-path-or-name", root / "text.jsonl", "--calib-size", 8,
                          "--calib-max-sequence-length", 64, "--skip-generate")),
            tools.logits_job(root / f"{name}_logits", ids, "--load", root / name, "--fp32"),
            ("export", ("--load", root / name, "--export-dir", root / f"{name}_hf", "--fp32")),
        ]  # fmt: skip
    for name in TOLERANCES:
        simulated = ("--export-dir", root / f"{name}_simulated", "--export-vllm-fq", "--fp32")
        jobs.append(("export", ("--load", root / name, *simulated)))
    training = (
        *("--finetune-data-files", root / "chat.jsonl", "--fp32", "--seq-length", 128),
        *("--train-iters", 3, "--micro-batch-size", 1, "--log-interval", 1, "--eval-iters", 0),
    )
    jobs += [
        tools.logits_job(root / "scaled_logits", ids, "--pretrained-model-path", root / "scaled",
                         "--fp32"),
        ("convert", ("--pretrained-model-path", root / "fp8", "--save", root / "fp8_mlm")),
        ("export", ("--load", root / "fp8_mlm", "--export-dir", root / "fp8_hf")),
        ("eagle3", (*source, *training, "--save", root / "drafted")),
        ("validate", ("--load", root / "drafted", "--fp32", "--osl", 8, "--steps", 2,
                      "--prompts-path", root / "prompts.jsonl", "--require-identical",
                      "--validate-output", root / "validate.json")),
        ("distill", ("--load", root / "fp8_mlm", "--teacher", root / "source", *training,
                     "--save", root / "distilled")),
    ]  # fmt: skip
    return tools.run_stages(*jobs).stderr


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_engine_logits_equal_the_quantized_models(root, done, name):
    actual = engine_logits(root / f"{name}_hf", tools.tokens())
    wanted = tools.read_logits(root / f"{name}_logits")
    assert (actual - wanted).abs().mean() < TOLERANCES[name] * wanted.std()


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_stand_for_the_quantized_models_weights(root, model, done, name):
    plain = transformers_model(root / f"{name}_hf", root / f"{name}_plain", decode_integers)
    actual = tools.transformers_logits(plain, tools.tokens())
    wanted = tools.read_logits(root / f"{name}_logits")
    original = tools.transformers_logits(model, tools.tokens())
    assert (actual - wanted).abs().mean() < 0.01 * wanted.std()
    assert (original - wanted).abs().mean() > 0.01 * wanted.std()


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_down_projections_and_routers_are_named_as_not_quantized(root, done, name):
    quantization = json.loads((root / f"{name}_hf" / "hf_quant_config.json").read_text())
    excluded = set(quantization["quantization"]["exclude_modules"])
    for layer in range(3):
        attention = f"model.layers.{layer}.self_attn"
        assert {f"{attention}.q_a_proj", f"{attention}.kv_a_proj_with_mqa"} <= excluded
    assert {"model.layers.2.mlp.gate", f"model.layers.{FURTHER}.*"} <= excluded
    left_out = json.loads((root / name / "run.json").read_text())["metrics"]["coverage"]["left_out"]
    assert "down projections" in left_out["decoder.layers.0.self_attention.linear_q_down_proj"]


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_layers_for_further_tokens_travel_with_the_model_unquantized(root, fp8, done, name):
    layer = f"model.layers.{FURTHER}."
    wanted = {each: tensor for each, tensor in fp8.items() if each.startswith(layer)}
    checkpoint = json.loads((root / name / "run.json").read_text())
    assert any("extra_tensors-00001" in each["file"] for each in checkpoint["outputs"])
    for folder in (root / f"{name}_hf", root / f"{name}_simulated"):
        stored = dict(tools.tensors(folder))
        assert {each for each in stored if each.startswith(layer)} == wanted.keys()
        for each, tensor in wanted.items():
            assert stored[each].dtype == tensor.dtype and torch.equal(stored[each], tensor), each
        record = json.loads((folder / "run.json").read_text())
        assert record["metrics"]["tensors_carried"] == len(wanted)


def test_the_softmax_scale_has_mscale_squared(root, scaled, done):
    wanted = tools.transformers_logits(scaled, tools.tokens())
    assert (tools.read_logits(root / "scaled_logits") - wanted).abs().max() < 1e-4
    for layer in scaled.model.layers:
        layer.self_attn.scaling = layer.self_attn.qk_head_dim**-0.5
    without = tools.transformers_logits(scaled, tools.tokens())
    assert (without - wanted).abs().max() > 0.1, "the factor would not be seen"


def assert_plain(folder, plain):
    found = dict(tools.tensors(folder))
    assert found.keys() == plain.keys()
    for name, tensor in plain.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_fp8_weights_are_read_as_the_numbers_that_they_stand_for(root, fp8, done):
    assert_plain(root / "fp8_hf", fp8)
    for folder in ("fp8_hf", "fp8_mlm/huggingface"):
        assert "quantization_config" not in json.loads((root / folder / "config.json").read_text())


def test_a_rank_reads_its_part_of_a_block(root, fp8, done):
    two = ("--tensor-model-parallel-size", 2)
    tools.run_stages(
        ("convert", ("--pretrained-model-path", root / "fp8", "--save", root / "fp8_two", *two)),
        processes=2,
    )
    tools.run_stages(("export", ("--load", root / "fp8_two", "--export-dir", root / "fp8_two_hf")))
    assert_plain(root / "fp8_two_hf", fp8)


def test_fp8_weights_without_scales_are_refused(root, fp8, tmp_path):
    damaged = tmp_path / "model"
    damaged.mkdir()
    for each in (root / "fp8").glob("*.json"):
        (damaged / each.name).write_bytes(each.read_bytes())
    lost = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    stored = {name: t for name, t in tools.tensors(root / "fp8") if name != lost}
    save_file(stored, damaged / "model.safetensors", metadata={"format": "pt"})
    flags = ("--pretrained-model-path", damaged, "--save", tmp_path / "refused")
    done = tools.run("convert.py", *flags, code=2)
    assert "o_proj.weight is FP8, and nothing says with which scales" in done.stderr


def test_a_draft_of_the_model_decodes_as_the_model_alone(root, done):
    acceptance = json.loads((root / "validate.json").read_text())["acceptance"]
    assert acceptance["identical_answers"] == acceptance["answers"] > 0
    assert (root / "distilled" / "run.json").is_file()


@pytest.mark.parametrize(
    ("stage", "flags", "reason"),
    [
        ("prune", ("--prune-export-config", '{"hidden_size": 64}'), "the norms of its latents"),
        ("quantize", ("--export-kv-cache-quant", "fp8"), "with multi-latent attention"),
        ("quantize", ("--export-quant-cfg", "FP8_KV_CFG"), "with multi-latent attention"),
        ("convert", ("--export-default-te-spec",), "the norms of its latents"),
    ],
)
def test_what_does_not_work_is_refused_before_anything_is_loaded(
    root, model, tmp_path, stage, flags, reason
):
    source = ("--pretrained-model-path", root / "source", "--save", tmp_path / "refused")
    done = tools.run(f"{stage}.py", *source, *flags, "--check", code=2)
    assert reason in " ".join(done.stderr.split())
