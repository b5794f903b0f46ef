"""What an engine would compute from an exported folder is what the quantized model computed.

The folder is decoded here with NumPy and a table, not with the library's own reader, and run by
transformers with the inputs of each quantized linear rounded as the format says. Both models are in
float32, so weights must agree to float32 rounding. Logits may differ a little more: where an
activation lies on the border between two codes, the different order of additions decides, and one
code is a step of up to 6 % (FP8) or 25 % (NVFP4) of that element. Such flips are rare, so the mean
difference is held to 1 % of the logits' standard deviation (FP8) or 3 % (NVFP4), and a model with
a wrong scale anywhere is off by far more, which the last test shows.
"""

from __future__ import annotations

import json

import numpy
import pytest
import tools
import torch
from safetensors import safe_open

TOLERANCES = {"FP8_DEFAULT_CFG": 0.01, "NVFP4_DEFAULT_CFG": 0.03}  # of a standard deviation
CODES = numpy.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=numpy.float32)


def stored_tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found.update({name: shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return found


def decode(tensors, name):
    """The weight ``name`` in float32, from whatever form it is stored in."""
    weight = tensors[f"{name}.weight"]
    scale = tensors.get(f"{name}.weight_scale")
    if scale is None:
        return weight.float()
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float() * scale.float()
    packed = weight.numpy()
    nibbles = numpy.empty((packed.shape[0], 2 * packed.shape[1]), dtype=numpy.uint8)
    nibbles[:, 0::2], nibbles[:, 1::2] = packed & 15, packed >> 4
    values = CODES[nibbles & 7] * numpy.where(nibbles & 8, -1, 1).astype(numpy.float32)
    blocks = values.reshape(len(packed), -1, 16) * scale.float().numpy()[:, :, None]
    total = blocks.reshape(len(packed), -1) * tensors[f"{name}.weight_scale_2"].float().numpy()
    return torch.from_numpy(total)


def nearest_code(x):
    """Round magnitudes to E2M1, ties to the even code, saturating at 6."""
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    magnitude = x.abs()
    up = torch.bucketize(magnitude, borders, right=False)
    down = torch.bucketize(magnitude, borders, right=True)
    # At a border the two differ by one code; take the even one.
    code = torch.where(up % 2 == 0, up, down)
    return torch.from_numpy(CODES)[code] * x.sign()


def rounded_input(x, input_scale, is_fp8):
    """What a linear sees of its input: E4M3 with one scale, or E2M1 in blocks of 16."""
    if is_fp8:
        codes = (x / input_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.float() * input_scale
    blocks = x.reshape(*x.shape[:-1], -1, 16)
    largest = blocks.abs().amax(-1, keepdim=True)
    scale = (largest / 6 / input_scale).clamp(max=448).to(torch.float8_e4m3fn).float()
    scale = scale * input_scale
    codes = nearest_code(torch.where(scale > 0, blocks / scale, 0))
    return (codes * scale).reshape(x.shape)


def rounding_hook(input_scale, is_fp8):
    def hook(_module, inputs):
        return (rounded_input(inputs[0], input_scale.float(), is_fp8),)

    return hook


def engine_logits(folder, reference, ids):
    """Run ``reference`` with the folder's weights and rounded inputs."""
    tensors = stored_tensors(folder)
    handles = []
    quantized = 0
    with torch.no_grad():
        for name, module in reference.named_modules():
            if f"{name}.weight" in tensors:
                module.weight.copy_(decode(tensors, name))
            scale = tensors.get(f"{name}.input_scale")
            if scale is not None:
                quantized += 1
                is_fp8 = tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn

                handles.append(module.register_forward_pre_hook(rounding_hook(scale, is_fp8)))
    logits = tools.transformers_logits(reference, ids)
    for handle in handles:
        handle.remove()
    return logits, quantized


def evaluation(root, name, reference, *more):
    """A job that compares a checkpoint with a folder, on text."""
    load = root / ("NVFP4_DEFAULT_CFG" if name == "source" else name)
    words = ("--load", load, "--reference", reference, "--fp32", "--text", root / "text.jsonl")
    return ("evaluate", (*words, "--evaluate-output", root / f"{name}.json", *more))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Format -> folder, Megatron's logits; one model, quantized and exported in each format.

    Its layer 2 is an identity, and layer 3 has no keys and values: weights that are zero, and
    inputs that are, have scales too.
    """
    root = tmp_path_factory.mktemp("quantized")
    reference = tools.random_model(root / "source", "llama3")
    with torch.no_grad():
        for layer, names in ((2, ("o_proj", "down_proj")), (3, ("k_proj", "v_proj"))):
            for name, parameter in reference.model.layers[layer].named_parameters():
                if any(part in name for part in names):
                    parameter.zero_()
    reference.save_pretrained(root / "source")
    (root / "text.jsonl").write_text(
        "\n".join(json.dumps({"text": f"line {i}: " + "some text " * 9}) for i in range(60))
    )
    ids = tools.tokens()
    jobs = []
    for name in TOLERANCES:
        work = root / name
        jobs += [
            (
                "quantize",
                (
                    *("--pretrained-model-path", root / "source", "--save", work, "--fp32"),
                    *("--export-quant-cfg", name, "--skip-generate"),
                    *("--calib-dataset-path-or-name", root / "text.jsonl"),
                    *("--calib-size", 8, "--calib-max-sequence-length", 64),
                ),
            ),
            tools.logits_job(root / f"{name}_logits", ids, "--load", work, "--fp32"),
            ("export", ("--load", work, "--export-dir", root / f"{name}_hf", "--fp32")),
            evaluation(root, name, root / f"{name}_hf", "--weights-only"),
        ]
    jobs.append(evaluation(root, "source", root / "source"))
    tools.run_stages(*jobs)
    logits = {name: tools.read_logits(root / f"{name}_logits") for name in TOLERANCES}
    return root, reference, ids, logits


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_engine_logits_equal_the_quantized_models(exported, name):
    root, reference, ids, logits = exported
    actual, quantized = engine_logits(root / f"{name}_hf", reference, ids)
    difference = (actual - logits[name]).abs()
    deviation = logits[name].std()
    assert quantized == 6 * 7
    assert difference.mean() < TOLERANCES[name] * deviation, (difference.mean(), deviation)


@pytest.mark.parametrize(("name", "bits"), [("FP8_DEFAULT_CFG", 8), ("NVFP4_DEFAULT_CFG", 4.5)])
def test_linears_have_the_size_that_the_format_promises(exported, name, bits):
    tensors = stored_tensors(exported[0] / f"{name}_hf")
    linears = [n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")]
    stored = sum(
        tensor.numel() * tensor.element_size()
        for n in linears
        for kind in ("weight", "weight_scale")
        if (tensor := tensors[f"{n}.{kind}"]).numel() > 1
    )
    weights = sum(decode(tensors, n).numel() for n in linears)
    assert len(linears) == 6 * 7
    assert 8 * stored / weights == pytest.approx(bits, rel=1e-3)


@pytest.mark.parametrize("name", list(TOLERANCES))
def test_configuration_says_what_is_quantized(exported, name):
    folder = exported[0] / f"{name}_hf"
    quantization = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert quantization["quant_algo"] == config["quant_algo"] == name.split("_")[0]
    assert "lm_head" in quantization["exclude_modules"]
    assert config["quant_method"] == "modelopt"


def test_a_wrong_scale_is_seen(exported, tmp_path):
    """The comparison above and the library's own reader both notice one scale that is off."""
    from safetensors.torch import save_file

    from post_training.export import comparison, readback

    root, reference, ids, logits = exported
    tensors = stored_tensors(root / "FP8_DEFAULT_CFG_hf")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for each in (root / "FP8_DEFAULT_CFG_hf").glob("*.json"):
        (damaged / each.name).write_bytes(each.read_bytes())
    name = "model.layers.4.mlp.down_proj"
    original = decode(tensors, name)
    tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"] * 1.5
    save_file(tensors, damaged / "model.safetensors")
    actual, _ = engine_logits(damaged, reference, ids)
    assert (actual - logits["FP8_DEFAULT_CFG"]).abs().mean() > 0.01 * actual.std()
    assert comparison.compare(
        readback.Folder(damaged), [(f"{name}.weight", original)], torch.bfloat16
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"), "is missing"),
        (
            lambda t: t.pop("model.layers.1.self_attn.q_proj.weight_scale"),
            "not said to be quantized",
        ),
        (
            lambda t: t.update({"lm_head.weight_scale": torch.ones(())}),
            "configuration calls unquantized",
        ),
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.input_scale": torch.tensor(0.0)}),
            "not finite and positive",
        ),
        (lambda t: t.update({"model.layers.9.extra": torch.ones(2)}), "no tensor of this"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.input_scale"), "input_scale is missing"),
        (
            lambda t: t["model.layers.0.mlp.up_proj.input_scale"].mul_(2),
            "computed as one, but differ in input_scale",
        ),
        (
            lambda t: t["model.layers.0.self_attn.k_proj.weight_scale"].mul_(2),
            "computed as one, but differ in weight_scale",
        ),
        *(
            (lambda t, v=v: t["model.layers.0.self_attn.o_proj.weight_scale"].fill_(v), "finite")
            for v in (float("nan"), float("inf"), 0.0)
        ),
        (
            lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
            "lm_head.weight is stored as F8_E4M3, but not said to be quantized",
        ),
    ],
)
def test_reader_names_what_is_wrong(exported, tmp_path, change, message):
    from safetensors.torch import save_file

    from post_training.export import readback

    source = exported[0] / "FP8_DEFAULT_CFG_hf"
    for each in source.glob("*.json"):
        (tmp_path / each.name).write_bytes(each.read_bytes())
    tensors = stored_tensors(source)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    assert any(message in problem for problem in readback.Folder(tmp_path).problems())
    assert readback.Folder(source).problems() == []


@pytest.mark.parametrize(
    ("file", "keys", "value", "message"),
    [
        ("hf_quant_config.json", ("quantization", "group_size"), 32, "blocks of 16, not of 32"),
        ("config.json", ("torch_dtype",), "float32", "dtype and torch_dtype"),
        ("config.json", ("num_key_value_heads",), 4, "the architecture needs"),
        ("hf_quant_config.json", ("quantization", "exclude_modules"), [], "does not exclude it"),
    ],
)
def test_a_changed_configuration_is_seen(exported, tmp_path, file, keys, value, message):
    from post_training.export import readback

    source = exported[0] / "NVFP4_DEFAULT_CFG_hf"
    assert readback.Folder(source).problems() == []
    for each in source.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    content = json.loads((tmp_path / file).read_text())
    *parents, last = keys
    place = content
    for key in parents:
        place = place[key]
    assert place.get(last) != value
    place[last] = value
    (tmp_path / file).write_text(json.dumps(content))
    found = readback.Folder(tmp_path).problems()
    assert any(message in problem for problem in found), found[:5]


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "default"}, "rotary_base"),
        ("rms_norm_eps", 1e-3, "layernorm_epsilon"),
        ("num_attention_heads", 2, "num_attention_heads"),
        ("hidden_act", "gelu", "hidden_act"),
    ],
)
def test_a_value_that_no_shape_shows_is_compared_with_the_models(exported, key, value, name):
    from post_training.export import computed_as
    from post_training.models.architecture import Architecture

    root = exported[0]
    written = json.loads((root / "FP8_DEFAULT_CFG_hf" / "config.json").read_text())
    saved = json.loads((root / "FP8_DEFAULT_CFG" / "run.json").read_text())["architecture"]
    model = Architecture.from_json(saved)
    assert computed_as.problems(written, model) == []
    found = computed_as.problems({**written, key: value}, model)
    assert any(name in each for each in found), found


def test_parts_of_a_fused_linear_with_different_algorithms_are_seen(exported, tmp_path):
    """One of q, k and v in 16 bits, as files and configuration both say."""
    from safetensors.torch import save_file

    from post_training.export import readback

    source, module = exported[0] / "FP8_DEFAULT_CFG_hf", "model.layers.1.self_attn.k_proj"
    for each in source.glob("*.json"):
        (tmp_path / each.name).write_bytes(each.read_bytes())
    tensors = stored_tensors(source)
    tensors[f"{module}.weight"] = decode(tensors, module).bfloat16()
    for kind in ("weight_scale", "input_scale"):
        del tensors[f"{module}.{kind}"]
    save_file(tensors, tmp_path / "model.safetensors")
    content = json.loads((tmp_path / "hf_quant_config.json").read_text())
    content["quantization"]["exclude_modules"].append(module)
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(content))
    found = readback.Folder(tmp_path).problems()
    assert any("computed as one, but are FP8 and None" in each for each in found), found


def test_missing_quantization_config_is_seen(exported, tmp_path):
    from post_training.export import readback

    source = exported[0] / "FP8_DEFAULT_CFG_hf"
    for each in source.iterdir():
        if each.name != "hf_quant_config.json":
            (tmp_path / each.name).write_bytes(each.read_bytes())
    assert readback.Folder(tmp_path).problems()


def test_a_wrong_input_scale_is_seen(exported, tmp_path):
    from safetensors.torch import save_file

    from post_training.export import comparison, readback

    source = exported[0] / "FP8_DEFAULT_CFG_hf"
    for each in source.glob("*.json"):
        (tmp_path / each.name).write_bytes(each.read_bytes())
    tensors = stored_tensors(source)
    name = "model.layers.0.self_attn.q_proj.input_scale"
    calibrated = tensors[name].clone()
    tensors[name] = calibrated * 1.01
    save_file(tensors, tmp_path / "model.safetensors")
    reference = [(name, calibrated.reshape(()))]
    assert comparison.compare(readback.Folder(tmp_path), reference, torch.float32)
    assert not comparison.compare(readback.Folder(source), reference, torch.float32)


@pytest.mark.parametrize(
    ("largest", "kernel_code"),
    [
        (0.75, 320.0),  # 336 in units of the tensor's scale: a tie, which the kernel may break
        (0.75, 352.0),  # either way
        (1.5 * 2**-9 / 448, 2 * 2**-9),  # subnormal: the maximum becomes 4 steps, not 6
        (1.0, 448.0),
    ],
)
def test_nvfp4_block_scales_are_those_that_the_weights_were_rounded_with(largest, kernel_code):
    from types import SimpleNamespace

    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    from post_training.export.fake_quantized import nvfp4_block_scales

    generator = torch.Generator().manual_seed(0)
    blocks = torch.rand(2, 16, generator=generator) * 2 - 1
    blocks[:, 0] = 1
    unrounded = blocks * torch.tensor([[1.0], [largest]])
    scales = torch.tensor([[448.0], [kernel_code]]) / (6 * 448)
    rounded = nearest_code(unrounded / scales) * scales
    quantizer = SimpleNamespace(block_sizes={-1: 16}, _amax=torch.tensor(1.0))
    tensor_scale = torch.tensor(1 / (6 * 448))
    found = nvfp4_block_scales(
        quantizer,
        rounded.reshape(1, 32),
        NVFP4QTensor.get_weights_scaling_factor(unrounded.reshape(1, 32), 16, tensor_scale)[0],
        tensor_scale,
    )
    assert found.float().tolist() == [[448.0, kernel_code]]


@pytest.mark.parametrize("name", TOLERANCES)
def test_evaluate_finds_the_exported_weights_in_the_checkpoint(exported, name):
    """The stage reads the folder with the export's decoders; only the weights are rounded there."""
    root = exported[0]
    reports = [json.loads((root / f"{n}.json").read_text()) for n in (name, "source")]
    found, original = (each["text"] for each in reports)
    notes = [note for each in reports for note in each["notes"].values()]
    assert notes == [{"weights_only": True}], "an engine rounds inputs too"
    assert found["kl"]["max"] < 1e-4
    assert found["top_1_agreement"]["share"] == 1.0
    assert found["difference"]["perplexity_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert original["kl"]["mean"] > 1000 * abs(found["kl"]["mean"])
