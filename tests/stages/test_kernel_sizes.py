"""Layers that no kernel of vLLM takes are refused before the work, whatever asks for the format."""

from __future__ import annotations

import json
import re

import pytest
import tools

from post_training.common.errors import UsageError
from post_training.config import arguments
from quantize import QuantizeOptions, check

SIZES = {"hidden_size": 256, "head_dim": 32, "num_hidden_layers": 2}
# q, k and v have (3 + 2) * 32 outputs.
ODD = {**SIZES, "intermediate_size": 512, "num_attention_heads": 3, "num_key_value_heads": 1}
EXPERTS = {
    **SIZES,
    **{"num_attention_heads": 8, "num_key_value_heads": 4, "moe_intermediate_size": 128},
    **{"intermediate_size": 512, "mlp_only_layers": [1], "num_experts": 2},
}
# k and v have 2 * 32 outputs each, and q, k and v together two blocks of 128.
NARROW = {
    **{**SIZES, "hidden_size": 128},
    **{"intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2},
}
BIG = {
    **{"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 32},
    **{"num_attention_heads": 8, "num_key_value_heads": 4},
}
WEIGHTS = """
    - {quantizer_name: '*', enable: false}
    - {quantizer_name: '*%sweight_quantizer', cfg: {num_bits: 8, axis: 0}}
"""
SQUARES = """
    - {quantizer_name: '*', enable: false}
    - {quantizer_name: '*weight_quantizer', cfg: {num_bits: e4m3, block_sizes: {-1: 128, -2: 128}}}
"""
INPUTS = "    - {quantizer_name: '*%sinput_quantizer', cfg: {num_bits: 8, axis: null}}\n"
NEVER = """    - {quantizer_name: '*output_layer*', enable: false}
    - {quantizer_name: '*router*', enable: false}
"""
PTQ = "metadata: {recipe_type: ptq}\nquantize:\n  algorithm: max\n  quant_cfg:"
SEARCH = """
metadata: {recipe_type: auto_quantize}
auto_quantize:
  constraints: {effective_bits: 12}
  auto_quantize_method: gradient
  score_size: 1
  candidate_formats:
  - algorithm: max
    quant_cfg:"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("kernels")
    tools.random_model(root / "odd", "qwen3", **ODD)
    tools.random_model(root / "narrow", "qwen3", **NARROW)
    tools.random_model(root / "experts", "qwen3-moe", **EXPERTS)
    tools.random_model(root / "odd dense", "qwen3-moe", **{**EXPERTS, "intermediate_size": 160})
    tools.write_texts(root / "text.jsonl")
    return root


def flags(models, name, save, *more):
    return (
        *("--pretrained-model-path", models / name, "--save", save, "--skip-generate"),
        *("--calib-dataset-path-or-name", models / "text.jsonl", "--calib-size", 2),
        *("--calib-max-sequence-length", 64, *more),
    )


AUTO = ("--export-quant-cfg", "auto", "--auto-quantize-bits", "12", "--auto-quantize-formats")
REFUSED = {
    "a search": ("odd", (*AUTO, "int8_wo"), "q, k, v has 160 outputs"),
    "a search with weights alone": ("odd", (*AUTO, "int8", "--weight-only"), "q, k, v has 160"),
    "a search whose weights alone nothing reads": ("odd", (*AUTO, "fp8", "--weight-only"), "scale"),
    "a search for experts": ("experts", (*AUTO, "int8"), "does not read experts in INT8_W8A8"),
    "blocks of rows": ("narrow", ("--export-quant-cfg", "fp8_pb_wo"), "k and v has 64 outputs"),
    "blocks of rows in a search": ("narrow", (*AUTO, "fp8_pb_wo"), "k and v has 64 outputs"),
    "experts with blocks of rows": ("experts", ("--export-quant-cfg", "fp8_pb_wo"), "read experts"),
    "experts with a scale a row": ("experts", ("--export-quant-cfg", "fp8_pc_pt"), "read experts"),
    "the dense layer beside experts": (
        "odd dense",
        ("--export-quant-cfg", "int8_wo"),
        "down has 256 outputs and 160 inputs",
    ),
    "blocks in a search": (
        "odd dense",
        (*AUTO, "int4_blockwise_weight_only"),
        "128 inputs share a scale, which does not divide FFN size 160",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_by_the_checks(models, tmp_path, case):
    name, given, shown = REFUSED[case]
    words = [str(each) for each in flags(models, name, tmp_path / "q", *given)]
    with pytest.raises(UsageError) as error:
        check(arguments.parse("quantize", QuantizeOptions, words))
    assert shown in error.value.cause


def test_layers_that_stay_in_16_bits_may_have_any_size(models, tmp_path):
    more = ("--export-quant-cfg", "int8_wo", "--disable-qkv-quant")
    words = [str(each) for each in flags(models, "odd", tmp_path / "q", *more)]
    with pytest.raises(UsageError, match="o has 256 outputs and 96 inputs") as error:
        check(arguments.parse("quantize", QuantizeOptions, words))
    (pattern,) = re.findall(r"--leave-out '(.+?)'", error.value.cause)
    words += ["--leave-out", pattern]
    check(arguments.parse("quantize", QuantizeOptions, words))
    # Of one layer alone, the other still does not fit.
    words[-1] = pattern.replace("*", "decoder.layers.1", 1)
    with pytest.raises(UsageError, match="o has 256 outputs and 96 inputs"):
        check(arguments.parse("quantize", QuantizeOptions, words))


LEFT_OUT = {
    "nothing": ("odd", "linear_fc2", "no linear layer matches", r"did you mean '\*linear_fc2\*'"),
    "thousands of brackets": ("odd", "[" * 9_999, "9,999 characters", "a pattern of names"),
    "misspelt": ("odd", "*.linear_ptoj", "no linear layer matches", r"\*\.linear_proj"),
    "a layer beyond the last": ("odd", "decoder.layers.2.*", "no linear", "self_attention"),
    "an expert by its other name": ("experts", "*.experts.1.up_proj", "1 of the 4", "exper"),
    "one linear of all experts": ("experts", "*experts*.down_proj", "2 of the 4 linears", "exper"),
    "one expert": ("experts", "*.local_experts.1.*", "2 of the 4 linears", "local_experts"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_a_pattern_that_leaves_out_nothing_or_a_part_is_refused(models, tmp_path, case):
    name, pattern, cause, remedy = LEFT_OUT[case]
    more = ("--export-quant-cfg", "fp8", "--leave-out", "*.linear_qkv", "--leave-out", pattern)
    words = [str(each) for each in flags(models, name, tmp_path / "q", *more)]
    with pytest.raises(UsageError, match=cause) as error:
        check(arguments.parse("quantize", QuantizeOptions, words))
    assert re.search(remedy, error.value.remedy), error.value.remedy


RECIPES = {
    "sizes": ("odd", PTQ + WEIGHTS % "" + NEVER, "linear_proj has 256 outputs and 96 inputs"),
    "experts": ("experts", PTQ + WEIGHTS % "" + INPUTS % "" + NEVER, "does not read experts"),
    "clipping": (
        "experts",
        PTQ.replace("max", "awq_clip") + WEIGHTS % "" + NEVER,
        "awq_clip fails at an expert that gets no token",
    ),
    "blocks of rows": ("narrow", PTQ + SQUARES + NEVER, "linear_qkv has 64 outputs"),
    "a search": ("odd", SEARCH + WEIGHTS % "", "linear_proj has 256 outputs and 96 inputs"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_a_recipe_is_refused_before_data_runs_through_the_model(models, tmp_path, case):
    name, content, shown = RECIPES[case]
    (tmp_path / "recipe.yaml").write_text(content)
    more = ("--recipe", tmp_path / "recipe.yaml")
    done = tools.run("quantize.py", *flags(models, name, tmp_path / "q", *more), code=2)
    assert shown in done.stderr
    assert "calibrating" not in done.stderr and "AutoQuantize" not in done.stdout
    assert not (tmp_path / "q").exists()


def test_recipes_that_kernels_take_are_exported(models, tmp_path):
    """Inputs in INT8 where there are no experts, and a search with room for all layers."""
    (tmp_path / "attention.yaml").write_text(
        PTQ + WEIGHTS % "self_attention*" + INPUTS % "self_attention*"
    )
    (tmp_path / "search.yaml").write_text(SEARCH + WEIGHTS % "")
    jobs = []
    for name in ("attention", "search"):
        more = ("--recipe", tmp_path / f"{name}.yaml")
        jobs += [
            ("quantize", flags(models, "experts", tmp_path / name, *more)),
            ("export", ("--load", tmp_path / name, "--export-dir", tmp_path / f"{name} hf")),
        ]
    # A linear of a search, and what no kernel takes by Hugging Face's names.
    search = ("--recipe", tmp_path / "search.yaml", "--leave-out", "*.local_experts.*")
    odd = ("--export-quant-cfg", "int8_wo", "--leave-out", "*.q_proj", "*.o_proj")
    for source, name, more in (("experts", "plain experts", search), ("odd", "odd", odd)):
        jobs += [
            ("quantize", flags(models, source, tmp_path / name, *more)),
            ("export", ("--load", tmp_path / name, "--export-dir", tmp_path / f"{name} hf")),
        ]
    tools.run_stages(*jobs)
    ignored = {}
    for name in ("odd", "plain experts"):
        config = json.loads((tmp_path / f"{name} hf" / "config.json").read_text())
        ignored[name] = config["quantization_config"]["ignore"]
    attention = [f"model.layers.{n}.self_attn.{w}_proj" for n in (0, 1) for w in "koqv"]
    assert ignored["odd"] == ["lm_head", *attention]
    assert [each for each in ignored["plain experts"] if "experts.1.down_proj" in each]
    assert not [each for each in ignored["plain experts"] if "layers.1.mlp" in each]
    content = json.loads((tmp_path / "odd" / "run.json").read_text())
    reasons = content["metrics"]["coverage"]["left_out"]
    assert reasons["decoder.layers.1.self_attention.linear_qkv"] == "--leave-out *.linear_qkv"
    assert content["quantization"]["left_out"] == ["*.linear_qkv", "*.linear_proj"]
    for name, algorithm in (("attention", "INT8_W8A8"), ("search", "INT8_W8A16")):
        content = json.loads((tmp_path / f"{name} hf" / "run.json").read_text())
        assert content["metrics"]["quant_algo"] == algorithm
    config = json.loads((tmp_path / "attention hf" / "config.json").read_text())
    ignored = config["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.experts.0.gate_proj" in ignored
    assert "model.layers.0.self_attn.q_proj" not in ignored


@pytest.mark.parametrize(
    ("name", "sizes", "shown"),
    [
        ("int8_wo", {"num_attention_heads": 3}, "q, k, v has 160 outputs and 256 inputs"),
        ("int4_blockwise_weight_only", {"head_dim": 48}, "q, k, v has 480 outputs"),
        ("int8", {"intermediate_size": 260}, "gate, up has 520 outputs and 256 inputs"),
    ],
)
def test_sizes_that_no_kernel_takes_are_refused(tmp_path, name, sizes, shown):
    tools.random_model(tmp_path / "model", "qwen3", **{**BIG, "num_key_value_heads": 1, **sizes})
    flags = ("--pretrained-model-path", tmp_path / "model", "--save", tmp_path / "q", "--check")
    words = [*map(str, flags), "--export-quant-cfg", name]
    with pytest.raises(UsageError) as error:
        check(arguments.parse("quantize", QuantizeOptions, words))
    assert shown in error.value.cause
    check(arguments.parse("quantize", QuantizeOptions, [*words, "--allow-unexportable"]))


def test_experts_with_one_group_of_int4_are_refused_for_sglang(tmp_path):
    for inputs in (128, 256):
        sizes = {**BIG, "moe_intermediate_size": inputs}
        tools.random_model(tmp_path / f"{inputs}", "qwen3-moe", **sizes)
    flags = (
        "--save",
        tmp_path / "q",
        "--check",
        "--export-quant-cfg",
        "int4_blockwise_weight_only",
    )
    words = [*map(str, flags), "--target", "sglang", "--pretrained-model-path"]
    check(arguments.parse("quantize", QuantizeOptions, [*words, str(tmp_path / "256")]))
    with pytest.raises(UsageError, match="has 128 inputs; SGLang computes experts"):
        check(arguments.parse("quantize", QuantizeOptions, [*words, str(tmp_path / "128")]))


@pytest.mark.parametrize("name", ["int8", "int8_sq"])
def test_experts_with_static_inputs_are_refused(tmp_path, name):
    tools.random_model(tmp_path / "model", "qwen3-moe")
    flags = ("--pretrained-model-path", tmp_path / "model", "--save", tmp_path / "q", "--check")
    words = [*map(str, flags), "--export-quant-cfg", name]
    with pytest.raises(UsageError, match="does not read experts in INT8_W8A8"):
        check(arguments.parse("quantize", QuantizeOptions, words))


@pytest.mark.parametrize("name", ["int8_sq_pt", "int8_pc_pt"])
def test_a_format_that_the_target_does_not_read_is_refused_before_calibration(tmp_path, name):
    tools.random_model(tmp_path / "model", "llama3", **BIG)
    flags = ("--pretrained-model-path", tmp_path / "model", "--save", tmp_path / "q", "--check")
    words = [*map(str, flags), "--export-quant-cfg", name, "--target"]
    check(arguments.parse("quantize", QuantizeOptions, [*words, "sglang"]))
    with pytest.raises(UsageError, match=r"TensorRT-LLM .* is not known to read INT.*vLLM, SGLang"):
        check(arguments.parse("quantize", QuantizeOptions, [*words, "trtllm"]))
    static = [each.replace(name, "int8") for each in words]
    with pytest.raises(UsageError, match=r"SGLang .* is not known to read INT8_W8A8"):
        check(arguments.parse("quantize", QuantizeOptions, [*static, "sglang"]))
