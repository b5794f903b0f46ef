"""gpt-oss: what no other family has, and what is refused for it before the work."""

from __future__ import annotations

import json

import pytest
import tools
import torch

from post_training.common.errors import UsageError
from post_training.models.families.registry import from_huggingface

WINDOW = 16


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder and model of a gpt-oss whose activations reach the limit of 7."""
    folder = tmp_path_factory.mktemp("gpt-oss") / "source"
    model = tools.random_model(folder, "gpt-oss", num_hidden_layers=4)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.experts.gate_up_proj *= 10
    model.save_pretrained(folder)
    return folder, model


def gate_up(model, ids):
    """What the experts of the first layer get as gate and up, of every token and expert."""
    seen = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].flatten(0, 1))
    )
    tools.transformers_logits(model, ids)
    hook.remove()
    experts = model.model.layers[0].mlp.experts
    with torch.inference_mode():
        return seen[0] @ experts.gate_up_proj + experts.gate_up_proj_bias[:, None]


def test_limits_sinks_and_windows_are_transformers(source, tmp_path):
    folder, model = source
    ids = tools.tokens()
    assert ids.shape[1] > 2 * WINDOW
    assert (gate_up(model, ids).abs() > 7).float().mean() > 0.1
    # Another one, whose windows follow no rule.
    types = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    changes = {"num_hidden_layers": 4, "layer_types": types}
    other = tools.random_model(tmp_path / "source", "gpt-oss", **changes)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    assert from_huggingface(config).value("window_attn_skip_freq") == [0, 0, 1, 0]
    folders = {"regular": (folder, model), "irregular": (tmp_path / "source", other)}
    more = ("--fp32", "--new-tokens", WINDOW)
    jobs = {
        name: tools.logits_job(tmp_path / name, ids, "--pretrained-model-path", each, *more)
        for name, (each, _) in folders.items()
    }
    tools.run_stages(*jobs.values())
    for name, (_, reference) in folders.items():
        wanted = tools.transformers_logits(reference, ids)
        assert (tools.read_logits(tmp_path / name) - wanted).abs().max() < 1e-4
        greedy = tools.transformers_tokens(reference, ids, WINDOW)
        assert tools.read_tokens(tmp_path / name) == greedy
    wanted = tools.transformers_logits(model, ids)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(float("-inf"))
    without = tools.transformers_logits(model, ids)
    assert (without - wanted).abs().max() > 0.1, "the sinks matter"


@pytest.mark.parametrize(
    ("stage", "flags", "parts"),
    [
        ("quantize", ("--export-quant-cfg", "FP8_DEFAULT_CFG"), ["FP8_DEFAULT_CFG", "BF16"]),
        ("eagle3", ("--finetune-data-files", __file__), ["position embedding: yarn"]),
        ("quantize", ("--export-quant-cfg", "auto"), ["auto", "BF16", "MXFP4"]),
        ("prune", ("--prune-export-config", '{"hidden_size": 64}'), ["GptOss", "attention sinks"]),
        ("convert", ("--tensor-model-parallel-size", 2), ["ETP=2", "biases", "set ETP=1"]),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_the_work(source, tmp_path, stage, flags, parts):
    where = ("--pretrained-model-path", source[0], "--save", tmp_path / "refused")
    done = tools.run(f"{stage}.py", *where, *flags, "--check", code=2)
    for part in parts:
        assert part in done.stderr
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"layer_types": ["full_attention", "chunked_attention"] * 3}, ["chunked_attention"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "6 layers"]),
        ({"sliding_window": 0}, ["sliding_window = 0"]),
        ({"num_experts_per_tok": 5}, ["num_local_experts = 4", "needs 5"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, ["mscale"]),
    ],
)
def test_descriptions_that_are_not_represented_are_named(changes, parts):
    with pytest.raises(UsageError) as refused:
        from_huggingface({**tools.FAMILIES["gpt-oss"].tiny_config(), **changes})
    for part in parts:
        assert part in str(refused.value)


def test_mxfp4_is_read_as_transformers_reads_it(tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    tools.random_model(tmp_path / "source", "gpt-oss", torch.bfloat16, num_hidden_layers=2)
    path = tmp_path / "source" / "model.safetensors"
    stored, wanted = load_file(path), {}
    generator = torch.Generator().manual_seed(0)
    for name in [name for name in stored if name.endswith("_proj") and ".experts." in name]:
        experts, inputs, outputs = stored.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        blocks = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        scales = torch.randint(0, 126, shape[:3], generator=generator, dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        wanted[name] = convert_moe_packed_tensors(blocks, scales)
    save_file(stored, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    quantized = {**config, "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "source" / "config.json").write_text(json.dumps(quantized))
    flags = ("--pretrained-model-path", tmp_path / "source", "--save", tmp_path / "converted")
    tools.run_stages(("convert", (*flags, "--expert-model-parallel-size", 2)), processes=2)
    exported = ("--load", tmp_path / "converted", "--export-dir", tmp_path / "exported")
    tools.run_stages(("export", exported))
    found = dict(tools.tensors(tmp_path / "exported"))
    plain = {n: t for n, t in stored.items() if not n.endswith(("_blocks", "_scales"))}
    assert found.keys() == plain.keys() | wanted.keys()
    for name, tensor in {**plain, **wanted}.items():
        # As bits: the sign of zeros, too.
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name
    assert json.loads((tmp_path / "exported" / "config.json").read_text()) == config
