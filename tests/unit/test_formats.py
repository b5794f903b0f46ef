"""The table of quantization formats: complete, spelled as in ModelOpt, strict about export."""

import re
import subprocess
import sys
import time
from types import SimpleNamespace

import formats_table
import pytest
import tools

from post_training.common.errors import UsageError
from post_training.models.families import registry as families
from post_training.quantization import format_table, kernels, recipes
from post_training.quantization.engines import registry as engines
from post_training.quantization.engines.base import GENERATIONS, READ
from post_training.quantization.formats import exportable
from post_training.quantization.formats import registry as formats
from post_training.quantization.formats.base import Linear

MODELOPT = """
import json
from modelopt.recipe import presets
from modelopt.torch.quantization import config
from modelopt.torch.quantization.config import QuantizeConfig
def same(a, b):
    return QuantizeConfig(**a).model_dump() == QuantizeConfig(**b).model_dump()
named = {name: getattr(config, name) for name in config.choices}
found = {
    preset: [name for name in named if same(named[name], value)]
    for preset, value in presets.QUANT_CFG_CHOICES.items()
}
print(json.dumps({"choices": sorted(config.choices), "presets": found}))
"""


@pytest.fixture(scope="module")
def modelopt():
    import json

    done = subprocess.run(
        [sys.executable, "-c", MODELOPT],
        capture_output=True,
        text=True,
        check=True,
        env=tools.environment(),
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_every_choice_of_modelopt_is_in_the_table_and_others_bring_their_configuration(modelopt):
    of_modelopt = [name for name, row in formats.FORMATS.items() if not row.quant_cfg]
    assert sorted(of_modelopt) == modelopt["choices"]
    assert len(modelopt["choices"]) == 39


def test_every_preset_of_modelopt_names_the_configuration_with_the_same_content(modelopt):
    for preset, names in modelopt["presets"].items():
        assert formats.find(preset).name in names


def test_no_two_formats_share_a_spelling():
    spellings = [s.lower() for row in formats.FORMATS.values() for s in (row.name, *row.spellings)]
    assert len(spellings) == len(set(spellings))


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("FP8_DEFAULT_CFG", "FP8_DEFAULT_CFG"),
        ("fp8", "FP8_DEFAULT_CFG"),
        ("Nvfp4", "NVFP4_DEFAULT_CFG"),
        ("int8_sq", "INT8_SMOOTHQUANT_CFG"),
        ("w4a8_awq", "W4A8_AWQ_BETA_CFG"),
        ("fp8_kv", "FP8_KV_CFG"),
    ],
)
def test_a_format_is_found_by_any_spelling(typed, meant):
    assert formats.find(typed).name == meant


@pytest.mark.parametrize(
    ("typed", "suggested"),
    [("fp9", "fp8"), ("NVFP4_DEFALT_CFG", "NVFP4_DEFAULT_CFG"), ("aut", "auto"), ("awq", "_awq")],
)
def test_an_unknown_name_gets_the_nearest_ones(typed, suggested):
    with pytest.raises(UsageError) as error:
        formats.find(typed)
    assert typed in error.value.what
    assert suggested in error.value.remedy


EXPORTED = {
    "FP8_DEFAULT_CFG": "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": "FP8_PB_WO",
    "NVFP4_DEFAULT_CFG": "NVFP4",
    "NVFP4_MLP_ONLY_CFG": "NVFP4",
    "W4A16_NVFP4_CFG": "W4A16_NVFP4",
    "MXFP8_DEFAULT_CFG": "MXFP8",
    "INT8_DEFAULT_CFG": "INT8_W8A8",
    "INT8_PER_CHANNEL_PER_TOKEN_CFG": "INT8_PER_CHANNEL_PER_TOKEN",
    "INT8_SMOOTHQUANT_PER_TOKEN_CFG": "INT8_PER_CHANNEL_PER_TOKEN",
    "INT8_WEIGHT_ONLY_CFG": "INT8_W8A16",
    "INT4_BLOCKWISE_WEIGHT_ONLY_CFG": "INT4_W4A16",
    "INT8_SMOOTHQUANT_CFG": "INT8_W8A8",
    "INT4_AWQ_CFG": "INT4_W4A16",
    "INT4_AWQ_CLIP_CFG": "INT4_W4A16",
    "INT4_AWQ_FULL_CFG": "INT4_W4A16",
    "NVFP4_AWQ_FULL_CFG": "NVFP4",
    "INT4_GPTQ_CFG": "INT4_W4A16",
    "INT8_GPTQ_CFG": "INT8_W8A16",
    "NVFP4_AWQ_LITE_CFG": "NVFP4",
    "W4A8_FP8_AWQ_CFG": "INT4_W4A8",
    "MXFP4_DEFAULT_CFG": "MXFP4",
    "MXFP4_MLP_WEIGHT_ONLY_CFG": "W4A16_MXFP4",
}
REFUSED = {
    "W4A8_AWQ_BETA_CFG": "TensorRT-LLM would",
    "NVFP4_SVDQUANT_DEFAULT_CFG": "low-rank",
    "NVFP4_MLP_WEIGHT_ONLY_CFG": "blocks of 32",
    "W4A8_MXFP4_FP8_CFG": "MXFP4 with inputs",
    "NVFP4_FOUR_OVER_SIX_CFG": "block scales",
    "NVFP4_FP8_MHA_CONFIG": "attention",
    "FP8_KV_CFG": "only in a model whose weights",
}


@pytest.mark.parametrize("name", EXPORTED)
def test_formats_that_engines_read_are_exportable(name):
    assert exportable.verdict(formats.FORMATS[name]).quant_algo == EXPORTED[name]


@pytest.mark.parametrize("name", REFUSED)
def test_formats_that_no_engine_would_read_correctly_are_refused_with_the_reason(name):
    found = exportable.verdict(formats.FORMATS[name])
    assert not found.exportable
    assert REFUSED[name] in found.reason


def test_every_exportable_algorithm_has_engines_and_gpus():
    found = [
        exportable.verdict(row, target=target)
        for row in formats.FORMATS.values()
        for target in engines.TARGETS
    ]
    algorithms = {each.quant_algo for each in found if each.exportable}
    assert algorithms | {"MIXED_PRECISION", "MIXED_COMPRESSED_TENSORS"} == set(engines.algorithms())
    for algorithm in algorithms:
        names, gpus = engines.describe(algorithm)
        assert names
        assert gpus


def test_weights_alone_are_known_by_the_name_that_each_engine_has_for_them():
    found = formats.of_weights_alone()
    assert {"W4A16_NVFP4", "INT4_W4A16", "W4A16_AWQ", "INT8_W8A16", "W8A16"} <= found
    assert not {"FP8", "NVFP4", "INT8_W8A8", "INT8_PER_CHANNEL_PER_TOKEN", "MXFP4"} & found


def test_weight_only_changes_the_verdict():
    fp8, nvfp4 = formats.FORMATS["FP8_DEFAULT_CFG"], formats.FORMATS["NVFP4_DEFAULT_CFG"]
    refused = exportable.verdict(fp8, weight_only=True)
    assert not refused.exportable
    assert "input scale" in refused.reason
    assert exportable.verdict(nvfp4, weight_only=True).quant_algo == "W4A16_NVFP4"


def test_the_kv_cache_changes_the_verdict():
    fp8 = formats.FORMATS["FP8_DEFAULT_CFG"]
    assert exportable.verdict(fp8, kv_cache="fp8").kv_cache_quant_algo == "FP8"
    assert exportable.verdict(fp8, kv_cache="nvfp4").kv_cache_quant_algo == "NVFP4"
    int8 = formats.FORMATS["INT8_WEIGHT_ONLY_CFG"]
    assert exportable.verdict(int8, kv_cache="fp8").kv_cache_quant_algo == "FP8"
    for target, cache in (("vllm", "nvfp4"), ("sglang", "fp8")):
        refused = exportable.verdict(int8, kv_cache=cache, target=target)
        assert "keys and values beside INT8_W8A16" in refused.reason
    for cache in ("fp8_affine", "nvfp4_affine", "nvfp4_rotate"):
        assert not exportable.verdict(fp8, kv_cache=cache).exportable


def test_only_formats_that_vllm_mixes_are_exportable_together():
    fp8, nvfp4 = Linear("fp8", "fp8"), Linear("nvfp4", "nvfp4")
    assert exportable.judge([fp8, nvfp4]).quant_algo == "MIXED_PRECISION"
    assert not exportable.judge([fp8, Linear("mxfp8", "mxfp8")]).exportable
    assert exportable.judge([]).exportable


@pytest.mark.parametrize(
    ("num_bits", "blocks", "axis", "name"),
    [
        ((4, 3), {}, None, "fp8"),
        ((4, 3), {}, 0, "fp8_channel"),
        ((4, 3), {-1: 128}, None, "fp8_block"),
        ((4, 3), {-1: 128, -2: 128}, None, "fp8_square"),
        ((4, 3), {-1: 32, "scale_bits": (8, 0), "type": "dynamic"}, None, "mxfp8"),
        ((2, 1), {-1: 16, "scale_bits": (4, 3), "type": "dynamic"}, None, "nvfp4"),
        ((2, 1), {-1: 16, "scale_bits": (4, 3), "type": "static"}, None, "nvfp4_static"),
        ((2, 1), {-1: 32, "scale_bits": (4, 3), "type": "dynamic"}, None, "nvfp4_block32"),
        ((2, 1), {-1: 64, "scale_bits": (4, 3), "type": "dynamic"}, None, None),
        ((2, 1), {-1: 32, "scale_bits": (8, 0), "type": "dynamic"}, None, "mxfp4"),
        (8, {}, 0, "int8_channel"),
        (4, {-1: 128}, None, "int4_block"),
        (5, {}, None, None),
    ],
)
def test_a_quantizer_is_recognised_by_its_bits_blocks_and_axis(num_bits, blocks, axis, name):
    quantizer = SimpleNamespace(num_bits=num_bits, block_sizes=blocks, axis=axis)
    found = formats.number_format(quantizer)
    assert (found.name if found else None) == name


def test_an_input_with_a_scale_per_token_is_recognised():
    quantizer = SimpleNamespace(num_bits=(4, 3), block_sizes={-1: None}, axis=None, _dynamic=True)
    assert formats.number_format(quantizer, is_input=True).name == "fp8_token"


def test_an_engine_that_does_not_read_a_format_is_named_with_those_that_do():
    found = exportable.verdict(formats.FORMATS["INT8_PER_CHANNEL_PER_TOKEN_CFG"], target="trtllm")
    assert not found.exportable
    assert "TensorRT-LLM" in found.reason
    assert "; vLLM, SGLang would" in found.reason
    fp8 = formats.FORMATS["FP8_DEFAULT_CFG"]
    assert exportable.verdict(fp8, target="sglang", kv_cache="fp8").exportable
    refused = exportable.verdict(fp8, target="sglang", kv_cache="nvfp4")
    assert "NVFP4 keys and values" in refused.reason
    mixture = [Linear("fp8", "fp8"), Linear("nvfp4", "nvfp4")]
    assert exportable.judge(mixture, target="trtllm").exportable
    assert "SGLang does not mix" in exportable.judge(mixture, target="sglang").reason


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", "INT8_W8A16", ""])
def test_an_architecture_that_an_engine_does_not_load_in_modelopts_layout(algorithm):
    family = tools.FAMILIES["gemma3"]
    values = families.from_huggingface(family.tiny_config()).resolved()
    kernels.check("it", algorithm, values, "trtllm")
    if algorithm in ("FP8", "NVFP4"):
        with pytest.raises(UsageError, match="tie embeddings") as raised:
            kernels.check("it", algorithm, values, "vllm")
        assert "INT8_WEIGHT_ONLY_CFG" in raised.value.remedy
    else:
        kernels.check("it", algorithm, values, "vllm")


def test_every_engine_and_gpu_is_shown_without_a_model():
    done = subprocess.run(
        ["bash", str(tools.ROOT / "export.sh"), "--list-formats"],
        capture_output=True,
        text=True,
        env={**tools.environment(), "PYTHON": sys.executable},
    )
    assert done.returncode == 0, done.stderr
    shown = re.sub(r"[\s│]+", "", done.stdout)
    for row in (*format_table.format_rows(), *format_table.engine_rows()):
        assert re.sub(r"\s", "", row[0]) in shown
    for generation in GENERATIONS:
        assert generation in shown


def test_a_run_that_the_table_claims_is_described_in_the_benchmarks():
    described = (tools.ROOT / "benchmarks" / "README.md").read_text()
    claims = 0
    for engine in engines.ENGINES:
        for algorithm, support in engine.algorithms.items():
            if READ in support.verified:
                continue
            claim = re.fullmatch(r"run in (\w+ [\w.]+) on (\w+), ([\d-]+)", support.verified)
            assert claim, support.verified
            assert claim[1] == f"{engine.name} {engine.version_of(algorithm)}"
            assert re.search(rf"{claim[1]} on an NVIDIA {claim[2]}", described)
            assert claim[3] in described
            assert algorithm in described
            claims += 1
    assert claims >= 5


def test_every_engine_names_the_version_and_file_that_was_read():
    for engine in engines.ENGINES:
        assert engine.version
        assert engine.loader.endswith(".py")
        for name, inside in engine.mixtures.items():
            assert {name, *inside} <= set(engine.algorithms)
        for support in engine.algorithms.values():
            assert {*support.native, *support.weights_alone} <= set(GENERATIONS)
            assert support.verified


def test_a_recipe_is_found_by_path_built_in_path_and_stem(tmp_path):
    own = tmp_path / "own.yaml"
    own.write_text("metadata: {recipe_type: ptq}\nquantize: {quant_cfg: []}\n")
    assert recipes.find(str(own)).path == own
    for name in ("general/ptq/fp8_default-kv_fp8.yaml", "fp8_default-kv_fp8"):
        assert recipes.find(name).kind == "ptq"
    assert recipes.find("nvfp4_fp8_at_5p4bits").kind == "auto_quantize"


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("a: [1", "not YAML"),
        ("quantize: {}\n", "metadata is missing"),
        ("just text\n", "it is 'just text': it should be a valid dictionary"),
        ("metadata: {recipe_type: ptq}\n", "it has no quantize"),
        ("metadata: {recipe_type: speculative_eagle}\neagle: {}\n", "speculative_eagle"),
    ],
)
def test_a_broken_recipe_is_refused_with_its_path(tmp_path, content, cause):
    path = tmp_path / "broken.yaml"
    path.write_text(content)
    with pytest.raises(UsageError) as error:
        recipes.find(str(path))
    assert str(path) in error.value.what
    assert cause in error.value.cause


def test_an_unknown_recipe_gets_the_nearest_ones():
    with pytest.raises(UsageError) as error:
        recipes.find("general/ptq/nvfp4_defalt-kv_fp8.yaml")
    assert "nvfp4_default-kv_fp8" in error.value.remedy


def test_the_markdown_table_has_a_line_for_each_format_and_algorithm():
    table = formats_table.markdown_table()
    generations = len(GENERATIONS)
    for name in [*(f"`{name}`" for name in formats.FORMATS), *engines.algorithms()]:
        assert f"| {name} |" in table
    widths = {line.count("|") for line in table.splitlines() if line.startswith("| `")}
    assert widths == {8}
    widths = {line.count("|") for line in table.split("\n\n")[1].splitlines()}
    assert widths == {5 + generations}


def test_the_table_is_read_without_torch_or_modelopt():
    code = (
        "import sys; from post_training.quantization import options, recipes\n"
        "from post_training.quantization.formats import exportable, registry\n"
        "for row in registry.FORMATS.values(): exportable.verdict(row)\n"
        "recipes.find('fp8_default-kv_fp8')\n"
        "assert not {'torch', 'modelopt', 'megatron'} & set(sys.modules)"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, env=tools.environment())
    assert time.monotonic() - started < 5
