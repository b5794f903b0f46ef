"""Exported drafts: their files alone compute what the Megatron draft computes; base and draft from
one checkpoint; the configuration that each engine reads; faults are found.

The forward pass below is written from the paper and the engines' sources, on plain PyTorch; it
shares nothing with this project, megatron-core or ModelOpt.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import tools
import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import load_file, save_file
from speculative_jobs import MAPPING, TEXT

from post_training.export import eagle3_readback
from post_training.export.readback import Folder

MODELS = ("qwen3", "llama3")
both = pytest.mark.parametrize("model", MODELS)


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + epsilon) * weight


def frequencies(config: dict) -> torch.Tensor:
    """Rotary frequencies, with Llama 3's scaling where the configuration has it."""
    size = config["head_dim"]
    found = config["rope_theta"] ** (-torch.arange(0, size, 2).float() / size)
    scaling = config["rope_scaling"]
    if scaling is None:
        return found
    assert scaling["rope_type"] == "llama3"
    length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / found
    smooth = (length / wavelength - low) / (high - low)
    blended = (1 - smooth) * found / scaling["factor"] + smooth * found
    result = torch.where(wavelength > length / low, found / scaling["factor"], blended)
    return torch.where(wavelength < length / high, found, result)


def rotated(heads: torch.Tensor, config: dict) -> torch.Tensor:
    """[heads, n, size] -> the same, turned by position."""
    angles = torch.outer(torch.arange(heads.shape[1]).float(), frequencies(config))
    cos, sin = (torch.cat([each, each], dim=-1) for each in (angles.cos(), angles.sin()))
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-second, first], dim=-1) * sin


def eagle3(folder: Path, embeddings: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Logits [n, draft vocabulary] from embeddings [n, h] of tokens 1..n and features [n, 3h]."""
    config = json.loads((folder / "config.json").read_text())
    weights = {name: each.float() for name, each in load_file(folder / "model.safetensors").items()}
    epsilon, size = config["rms_norm_eps"], config["head_dim"]
    hidden = features @ weights["fc.weight"].T

    def layer(name: str) -> torch.Tensor:
        return weights[f"midlayer.{name}.weight"]

    read = torch.cat(
        [
            rms_norm(embeddings, layer("input_layernorm"), epsilon),
            rms_norm(hidden, layer("hidden_norm"), epsilon),
        ],
        dim=-1,
    )
    queries, keys, values = (
        (read @ layer(f"self_attn.{name}_proj").T).unflatten(-1, (-1, size)).transpose(0, 1)
        for name in "qkv"
    )
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    attended = F.scaled_dot_product_attention(
        rotated(queries, config),
        rotated(keys, config).repeat_interleave(groups, dim=0),
        values.repeat_interleave(groups, dim=0),
        is_causal=True,
    )
    hidden = hidden + attended.transpose(0, 1).flatten(1) @ layer("self_attn.o_proj").T
    normed = rms_norm(hidden, layer("post_attention_layernorm"), epsilon)
    gate, up = normed @ layer("mlp.gate_proj").T, normed @ layer("mlp.up_proj").T
    hidden = hidden + (F.silu(gate) * up) @ layer("mlp.down_proj").T
    return rms_norm(hidden, weights["norm.weight"], epsilon) @ weights["lm_head.weight"].T


@both
@pytest.mark.parametrize("layout", ["TP=1", "PP=2"])
def test_the_files_alone_give_the_drafts_logits(drafted, model, layout):
    """Float32: sums in another order differ by some 1e-6 of logits around 3."""
    found = drafted.decoded(model, "TP=1")
    embedding = dict(tools.tensors(drafted.work / f"{model} hf"))["model.embed_tokens.weight"]
    logits = eagle3(
        drafted.exported(model, layout), embedding[TEXT[1:]].float(), found["features"][:-1]
    )
    expected = found["draft logits"]
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


@both
def test_the_features_are_the_outputs_of_the_layers_that_are_named(drafted, model):
    """As SGLang reads them; vLLM's numbers, one higher, name the same as inputs."""
    config = json.loads((drafted.exported(model, "TP=1") / "config.json").read_text())
    from transformers import AutoModelForCausalLM

    target = AutoModelForCausalLM.from_pretrained(drafted.work / f"{model} hf", dtype=torch.float32)
    with torch.inference_mode():
        states = target(torch.tensor([TEXT]), output_hidden_states=True).hidden_states
    # hidden_states[0] is the embedding, hidden_states[i] the input of layer i.
    inputs = [states[layer][0] for layer in config["eagle_aux_hidden_state_layer_ids"]]
    expected = drafted.decoded(model, "TP=1")["features"]
    torch.testing.assert_close(torch.cat(inputs, dim=-1), expected, rtol=1e-4, atol=2e-4)
    nested = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert [layer + 1 for layer in nested] == config["eagle_aux_hidden_state_layer_ids"]


@both
def test_every_layout_exports_the_same(drafted, model):
    one, other = (drafted.exported(model, layout) for layout in ("TP=1", "PP=2"))
    assert (one / "config.json").read_text() == (other / "config.json").read_text()
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_the_configuration_follows_the_target(drafted):
    for model in MODELS:
        config = json.loads((drafted.exported(model, "TP=1") / "config.json").read_text())
        target = json.loads((drafted.work / f"{model} hf" / "config.json").read_text())
        for name in ("max_position_embeddings", "rms_norm_eps", "hidden_size", "vocab_size"):
            assert config[name] == target[name], name
        assert config["rope_theta"] == target["rope_parameters"]["rope_theta"]
        assert config["architectures"] == ["LlamaForCausalLMEagle3"]
        assert config["tie_word_embeddings"] is False
    assert config["draft_vocab_size"] == 4
    assert config["rope_scaling"]["factor"] == 8.0


@both
def test_transformers_reads_positions_and_sizes(drafted, model):
    """As engines on transformers 5 do: rope_theta ends in rope_parameters."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(drafted.exported(model, "TP=1"))
    stated = json.loads((drafted.exported(model, "TP=1") / "config.json").read_text())
    assert config.model_type == "llama"
    assert config.rope_parameters["rope_theta"] == stated["rope_theta"]
    kind = "default" if stated["rope_scaling"] is None else "llama3"
    assert config.rope_parameters["rope_type"] == kind
    assert config.head_dim == stated["head_dim"]
    assert config.draft_vocab_size == stated["draft_vocab_size"]


def test_d2t_leads_from_the_drafts_tokens_to_the_targets(drafted):
    tensors = load_file(drafted.exported("llama3", "TP=1") / "model.safetensors")
    assert tensors["d2t"].dtype == torch.int64
    assert (tensors["d2t"] + torch.arange(4)).tolist() == MAPPING
    assert "d2t" not in load_file(drafted.exported("qwen3", "TP=1") / "model.safetensors")


def test_a_shared_head_is_the_targets(drafted):
    tensors = load_file(drafted.exported("qwen3", "TP=1") / "model.safetensors")
    target = dict(tools.tensors(drafted.work / "qwen3 hf"))
    assert torch.equal(tensors["lm_head.weight"], target["model.embed_tokens.weight"])
    # In 16 bits, of a target whose output layer is not its embedding.
    tensors = load_file(drafted.work / "llama3 bf16 draft" / "model.safetensors")
    target = dict(tools.tensors(drafted.work / "llama3 hf"))
    assert torch.equal(tensors["lm_head.weight"], target["lm_head.weight"].bfloat16())
    assert {each.dtype for each in tensors.values()} == {torch.bfloat16}


@both
@pytest.mark.parametrize("layout", ["TP=1", "PP=2"])
def test_the_base_of_a_drafted_checkpoint_is_the_target(drafted, model, layout):
    exported = dict(tools.tensors(drafted.work / f"{model} base {layout}"))
    source = dict(tools.tensors(drafted.work / f"{model} hf"))
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], source[name]) for name in source)


@both
@pytest.mark.parametrize("layout", ["TP=1", "PP=2"])
def test_the_draft_lies_beside_the_base_and_is_the_one_that_is_exported_alone(
    drafted, model, layout
):
    base, alone = drafted.work / f"{model} base {layout}", drafted.exported(model, layout)
    names = {"config.json", "model.safetensors"}
    assert {path.name for path in (base / "draft").iterdir()} == names
    for name in names:
        assert (base / "draft" / name).read_bytes() == (alone / name).read_bytes()
    record = json.loads((base / "run.json").read_text())
    assert record["metrics"]["draft"]["auxiliary_layers"] == [0, 2, 4]
    assert "draft/model.safetensors" in {each["file"] for each in record["outputs"]}
    assert not Folder(base).problems()


def test_a_draft_without_its_targets_layers_is_exported_alone(drafted):
    alone = load_file(drafted.work / "qwen3 offline draft" / "model.safetensors")
    assert alone.keys() == load_file(drafted.exported("qwen3", "TP=1") / "model.safetensors").keys()
    assert not (drafted.work / "qwen3 offline draft" / "draft").exists()


def test_base_and_draft_of_an_fp8_checkpoint(drafted):
    """The draft was attached to the quantized target and stays as it is."""
    base = json.loads((drafted.work / "fp8 base" / "hf_quant_config.json").read_text())
    assert base["quantization"]["quant_algo"] == "FP8"
    tensors = load_file(drafted.work / "fp8 draft" / "model.safetensors")
    assert {each.dtype for each in tensors.values()} == {torch.float32}
    assert not any("scale" in name for name in tensors)
    config = json.loads((drafted.work / "fp8 draft" / "config.json").read_text())
    assert "quantization_config" not in config


def test_the_manifest_says_what_was_compared(drafted):
    record = json.loads((drafted.exported("llama3", "PP=2") / "run.json").read_text())
    assert record["stage"] == "export"
    assert record["metrics"]["tensors_compared"] == 14
    assert record["metrics"]["auxiliary_layers"] == [0, 2, 4]


TARGET = {"hidden_size": 128, "vocab_size": 512, "num_hidden_layers": 6}


def spoiled(drafted, tmp_path, model="llama3", change=None, **config):
    """A copy of an exported draft with changed tensors or configuration, and its problems."""
    folder = shutil.copytree(drafted.exported(model, "TP=1"), tmp_path / "spoiled")
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **config}))
    tensors = load_file(folder / "model.safetensors")
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    target = {**TARGET, "max_position_embeddings": content["max_position_embeddings"]}
    return " ".join(eagle3_readback.problems(Folder(folder), target, [0, 2, 4]))


def test_a_sound_folder_has_no_problems(drafted, tmp_path):
    assert spoiled(drafted, tmp_path) == ""


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}, "at the top"),
        ({"rope_theta": None}, "config.json has no rope_theta"),
        ({"max_position_embeddings": 2048}, "the target's is"),
        ({"head_dim": 16}, "config.json says"),
        ({"torch_dtype": "bfloat16"}, "is stored as F32 instead of BF16"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    ],
)
def test_a_wrong_configuration_is_found(drafted, tmp_path, config, expected):
    assert expected in spoiled(drafted, tmp_path, **config)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("norm.weight", None, "norm.weight is missing"),
        ("extra", torch.ones(2), "extra is no tensor of a draft"),
        ("d2t", torch.tensor([0, 0, -1, 0]), "d2t leads to a token twice"),
        ("d2t", torch.tensor([0, 0, 0, 600]), "d2t leads to tokens outside"),
    ],
)
def test_a_wrong_tensor_is_found(drafted, tmp_path, name, value, expected):
    def change(tensors):
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value

    assert expected in spoiled(drafted, tmp_path, change=change)


def test_another_value_is_found(drafted):
    folder = Folder(drafted.exported("qwen3", "TP=1"))
    sound = folder.tensor("fc.weight")
    assert list(eagle3_readback.differences(folder, [("fc.weight", sound)])) == []
    assert list(eagle3_readback.differences(folder, [("fc.weight", sound + 1e-3)])) == [
        "fc.weight is not the model's"
    ]


@pytest.mark.parametrize(
    ("checkpoint", "expected"),
    [
        ("qwen3 plain", "it has no draft"),
        ("qwen3 deep", "engines load one layer"),
    ],
)
def test_what_has_no_draft_for_engines_is_refused_at_once(drafted, tmp_path, checkpoint, expected):
    flags = ("--load", drafted.work / checkpoint, "--export-dir", tmp_path / "out")
    done = tools.run("export.py", *flags, "--export-extra-modules", "--check", code=2)
    assert expected in done.stderr


@pytest.mark.parametrize("alone", [("--export-extra-modules",), ()])
def test_sglang_is_refused_a_draft_that_reads_the_last_layer(drafted, tmp_path, alone):
    flags = ("--load", drafted.work / "qwen3 late", "--export-dir", tmp_path / "out", *alone)
    done = tools.run("export.py", *flags, "--target", "sglang", "--check", code=2)
    assert "the draft reads the output of layer 5, the last one" in done.stderr
    tools.run("export.py", *flags, "--target", "vllm", "--check")


def test_a_checkpoint_with_a_draft_is_not_quantized(drafted, tmp_path):
    save = ("--load", drafted.work / "qwen3 drafted", "--save", tmp_path / "q")
    done = tools.run("quantize.py", *save, "--check", code=2)
    assert "it has a draft" in done.stderr


def test_a_checkpoint_with_its_targets_layers_is_not_called_offline(drafted, tmp_path):
    flags = ("--load", drafted.work / "qwen3 drafted", "--export-dir", tmp_path / "out")
    done = tools.run("export.py", *flags, "--export-offline-model", "--check", code=2)
    assert "the checkpoint has its target's layers" in done.stderr


def test_a_draft_that_no_engine_loads_stays_behind(drafted, tmp_path):
    """The base is what was asked for; the log says why its draft is not there."""
    flags = ("--load", drafted.work / "qwen3 deep", "--fp32", "--export-dir", tmp_path / "out")
    done = tools.run("export.py", *flags, "--few-shots", 3, "--few-shots", 5)
    assert done.stderr.count("--few-shots (a flag of mmlu)") == 1
    assert "the draft is not written: engines load one layer" in done.stderr
    assert not (tmp_path / "out" / "draft").exists()


def test_a_draft_vocabulary_that_was_never_filled_is_refused(drafted, tmp_path):
    flags = ("--load", drafted.work / "llama3 untrained", "--export-dir", tmp_path / "out")
    done = tools.run("export.py", *flags, "--export-extra-modules", code=2)
    assert "its d2t was never filled" in done.stderr
    assert list(tmp_path.iterdir()) == []
