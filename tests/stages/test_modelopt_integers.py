"""INT8 and INT4 weights in ModelOpt's layout, for TensorRT-LLM.

No TensorRT-LLM runs here. The judge is a decoder in NumPy, written after its loader: linears with
these weights and inputs in 16 bits. In float32 a code times its scale is exact to one rounding, so
logits may differ from the quantized model's by the order of additions alone (1e-4, of logits near
1). Inputs that are rounded to FP8 may fall on the other side of a border between two codes, so
there the mean difference is held to 1 % of the logits' standard deviation.
"""

from __future__ import annotations

import json

import numpy
import pytest
import tools
import torch

from post_training.common.errors import UsageError
from post_training.config import arguments
from post_training.export import readback
from quantize import QuantizeOptions, check

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_hidden_layers": 2,
    "tie_word_embeddings": False,
}
# --target of quantize, where it is not the default; what the export is called.
FORMATS = {
    "INT8_WEIGHT_ONLY_CFG": ("trtllm", "W8A16"),
    "INT4_AWQ_CFG": ("vllm", "W4A16_AWQ"),
    "INT4_GPTQ_CFG": ("trtllm", "W4A16_AWQ"),
    "W4A8_AWQ_BETA_CFG": ("trtllm", "W4A8_AWQ"),
}
MODULE = "model.layers.0.mlp.down_proj"


def decode(tensors, module):
    """The weight of a linear in float32, [out, in]."""
    stored = tensors[f"{module}.weight"].numpy()
    scale = tensors[f"{module}.weight_scale"].float().numpy()
    if scale.ndim == 1:
        return torch.from_numpy(stored.astype(numpy.float32) * scale[:, None])
    codes = numpy.empty((2 * len(stored), stored.shape[1]), dtype=numpy.int8)
    # Shifted up and down again, the highest of four bits is the sign.
    codes[0::2] = (stored << 4).view(numpy.int8) >> 4
    codes[1::2] = stored.view(numpy.int8) >> 4
    whole = tensors.get(f"{module}.weight_scale_2")
    if whole is None:
        return torch.from_numpy(codes.astype(numpy.float32) * scale.repeat(128, axis=1))
    # The kernel's way: scales and products in half precision, then E4M3.
    divided = (scale.astype(numpy.float16) / whole.numpy()).astype(numpy.float16)
    products = codes.astype(numpy.float16) * divided.repeat(128, axis=1)
    return torch.from_numpy(products).to(torch.float8_e4m3fn).float() * whole


def round_to_fp8(scale):
    def hook(_module, inputs):
        rounded = (inputs[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return (rounded.float() * scale,)

    return hook


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    root = tmp_path_factory.mktemp("integers")
    tools.random_model(root / "model", "llama3", **SIZES)
    text = tools.write_texts(root / "text.jsonl")
    jobs = []
    for name, (target, _) in FORMATS.items():
        load = ("--load", root / name, "--fp32")
        calibration = ("--calib-dataset-path-or-name", text, "--calib-size", 8)
        jobs += [
            (
                "quantize",
                (
                    *("--pretrained-model-path", root / "model", "--fp32", "--skip-generate"),
                    *("--export-quant-cfg", name, "--target", target, "--save", root / name),
                    *(*calibration, "--calib-max-sequence-length", 64),
                ),
            ),
            tools.logits_job(root / f"{name} logits", tools.tokens(), *load),
            ("export", (*load, "--target", "trtllm", "--export-dir", root / f"{name} hf")),
        ]
    tools.run_stages(*jobs)
    # As users have it, in bf16, from two ranks and from two stages.
    split = []
    for kind in ("tensor", "pipeline"):
        flags = (
            *("--pretrained-model-path", root / "model", "--skip-generate", f"--{kind}", 2),
            *("--export-quant-cfg", "W4A8_AWQ_BETA_CFG", "--target", "trtllm"),
            *(*calibration, "--calib-max-sequence-length", 64, "--save", root / kind),
        )
        named = [f"{each}-model-parallel-size" if each == f"--{kind}" else each for each in flags]
        split.append(("quantize", tuple(named)))
    tools.run_stages(*split, processes=2)
    tools.run_stages(
        *(
            ("export", ("--load", root / kind, "--export-dir", root / f"{kind} hf"))
            for kind in ("tensor", "pipeline")
        )
    )
    return root


@pytest.mark.parametrize("name", FORMATS)
def test_decoded_logits_are_the_quantized_models(exported, name):
    folder = exported / f"{name} hf"
    tensors = dict(tools.tensors(folder))
    model = readback.Folder(folder).untrained(dtype=torch.float32).eval()
    quantized = 0
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            module = key.removesuffix(".weight")
            is_quantized = f"{module}.weight_scale" in tensors
            quantized += is_quantized
            parameter.copy_(decode(tensors, module) if is_quantized else tensors[key])
    for name_of, module in model.named_modules():
        if (scale := tensors.get(f"{name_of}.input_scale")) is not None:
            module.register_forward_pre_hook(round_to_fp8(scale))
    assert quantized == 2 * 7, "all linears but the output layer"
    actual = tools.transformers_logits(model, tools.tokens())
    wanted = tools.read_logits(exported / f"{name} logits")
    if FORMATS[name][1] == "W4A8_AWQ":
        assert (actual - wanted).abs().mean() < 0.01 * wanted.std()
    else:
        assert (actual - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("name", FORMATS)
def test_the_files_have_the_form_that_the_loader_reads(exported, name):
    folder, algorithm = exported / f"{name} hf", FORMATS[name][1]
    said = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == algorithm
    assert said["exclude_modules"] == ["lm_head"]
    tensors = dict(tools.tensors(folder))
    weight, scale = (tensors[f"{MODULE}.{each}"] for each in ("weight", "weight_scale"))
    if algorithm == "W8A16":
        assert (weight.dtype, tuple(weight.shape)) == (torch.int8, (256, 512))
        assert tuple(scale.shape) == (256,)
        assert f"{MODULE}.pre_quant_scale" not in tensors
        return
    of_awq = [said[key] for key in ("group_size", "has_zero_point", "pre_quant_scale")]
    assert of_awq == [128, False, True]
    assert (weight.dtype, tuple(weight.shape)) == (torch.uint8, (128, 512))
    assert tuple(scale.shape) == (256, 4)
    assert torch.equal(tensors[f"{MODULE}.pre_quant_scale"], torch.ones(512))
    if algorithm == "W4A8_AWQ":
        for kind in ("weight_scale_2", "input_scale"):
            value = tensors[f"{MODULE}.{kind}"]
            assert (value.dtype, value.dim()) == (torch.float32, 0)
    record = json.loads((exported / name / "run.json").read_text())["quantization"]
    assert record["quant_algo"] == ("INT4_W4A16" if FORMATS[name][0] == "vllm" else algorithm)


@pytest.mark.parametrize("kind", ["tensor", "pipeline"])
def test_from_two_ranks_in_bf16_scales_are_exact_in_the_kernels_arithmetic(exported, kind):
    """Of the loader's two divisions and products in half precision none rounds."""
    tensors = dict(tools.tensors(exported / f"{kind} hf"))
    wholes = {key: float(value) for key, value in tensors.items() if key.endswith("_scale_2")}
    assert len(wholes) == 2 * 7
    for key, whole in wholes.items():
        assert numpy.frexp(whole)[0] == 0.5, "a power of two"
        scale = tensors[key.removesuffix("_2")]
        assert scale.dtype == torch.bfloat16
        exact = scale.double() / whole
        assert torch.equal(exact.half().double(), exact)
        for code in range(-8, 8):
            assert torch.equal((exact * code).half().double(), exact * code)


@pytest.mark.parametrize(
    ("family", "sizes", "more", "shown"),
    [
        ("qwen3-moe", {}, (), "does not read experts in W8A16"),
        ("phi3", SIZES, (), "of their own"),
        ("llama3", {**SIZES, "intermediate_size": 528}, (), "multiples of 64 and 64"),
        ("llama3", SIZES, ("--export-kv-cache-quant", "fp8"), "keys and values beside W8A16"),
    ],
)
def test_what_the_engine_does_not_read_so_is_refused(tmp_path, family, sizes, more, shown):
    tools.random_model(tmp_path / "model", family, **sizes)
    flags = ("--pretrained-model-path", tmp_path / "model", "--save", tmp_path / "q", "--check")
    words = [*map(str, flags), *more, "--export-quant-cfg", "int8_wo", "--target"]
    with pytest.raises(UsageError) as raised:
        check(arguments.parse("quantize", QuantizeOptions, [*words, "trtllm"]))
    assert shown in raised.value.cause
