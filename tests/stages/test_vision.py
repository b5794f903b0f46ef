"""Models that see images: their text model is converted, the rest travels bit for bit."""

from __future__ import annotations

import json
import shutil

import pytest
import tools
import torch
from safetensors.torch import save_file

from post_training.checkpoints import huggingface
from post_training.common.errors import UsageError
from post_training.export import stacked_experts
from post_training.models.families import registry as families

VISION = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 256,
    "vision_output_dim": 64,
    "image_size": 28,
    "patch_size": 14,
    "projector_input_dim": 64,
    "projector_output_dim": 64,
}
QWEN_VISION = {
    "depth": 1,
    "hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 128,
    "out_hidden_size": 128,
    "num_position_embeddings": 16,
}
PIXTRAL = {
    **{"model_type": "pixtral", "hidden_size": 64, "num_hidden_layers": 1, "head_dim": 16},
    **{"num_attention_heads": 4, "intermediate_size": 128, "image_size": 28, "patch_size": 14},
}
# Family -> that of its text, what it sees with, changes of the text model.
MODELS = {
    "llama4-vision": ("llama4", VISION, {"no_rope_layer_interval": 2}),
    "mistral3-vision": ("ministral3", PIXTRAL, {}),
    "qwen3.5-vision": ("qwen3.5", QWEN_VISION, {}),
    "qwen3.5-moe-vision": ("qwen3.5-moe", QWEN_VISION, {}),
}
NAMES = {each.name: each for each in families.FAMILIES.values() if each.prefix}
FORMAT = {"format": "pt"}
FURTHER = {"mtp.fc.weight": (128, 256), "mtp.layers.0.mlp.down_proj.weight": (128, 64)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """By family: a folder in bf16, and the transformers model in float32."""
    root = tmp_path_factory.mktemp("vision")
    return {name: of_family(root / name, name) for name in MODELS}


@pytest.fixture(scope="module")
def model(models):
    return models["llama4-vision"]


def of_family(folder, name):
    from transformers import AutoConfig, AutoModelForImageTextToText

    text, vision, changes = MODELS[name]
    text = tools.FAMILIES[text].tiny_config(num_hidden_layers=4, **changes)
    config = AutoConfig.for_model(
        NAMES[name].tiny["model_type"],
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.08)
    model.save_pretrained(folder)
    tools.chat_tokenizer().save_pretrained(folder)
    if name.startswith("qwen"):
        shutil.copytree(folder, folder.with_name(f"{name} as saved"))
        as_published(folder, NAMES[name].stacked)
    # Cast in place it would round its rotary frequencies.
    return folder, type(model).from_pretrained(folder, dtype=torch.float32).eval()


def as_published(folder, stacked):
    """With a layer's experts in one tensor, and layers that predict further tokens."""
    tensors = dict(tools.tensors(folder))
    tensors |= {name: torch.randn(shape).bfloat16() for name, shape in FURTHER.items()}
    save_file(stacked_experts.joined(tensors, stacked), folder / "model.safetensors", FORMAT)


def carried(name, tensors):
    """Names of what no layer of the text model has."""
    if not name.startswith("qwen"):
        return {each for each in tensors if not each.startswith("language_model.")}
    return {each for each in tensors if each.startswith(("model.visual.", "mtp."))}


def test_the_text_model_computes_and_everything_comes_back(models, tmp_path):
    ids, jobs = tools.tokens(), []
    for name, (folder, _) in models.items():
        work = tmp_path / name
        jobs += [
            ("convert", ("--pretrained-model-path", folder, "--save", work / "megatron")),
            ("export", ("--load", work / "megatron", "--export-dir", work / "exported")),
            tools.logits_job(work / "logits", ids, "--load", work / "megatron", "--fp32"),
        ]
    fused = ("--pretrained-model-path", models["llama4-vision"][0], "--fp32")
    fused = (*fused, "--export-default-te-spec")
    tools.run_stages(*jobs, tools.logits_job(tmp_path / "llama4-vision" / "fused", ids, *fused))
    for name, (folder, reference) in models.items():
        wanted, work = tools.transformers_logits(reference, ids), tmp_path / name
        assert wanted.std() > 0.5
        for computed in {"logits", "fused"} if name == "llama4-vision" else {"logits"}:
            assert (tools.read_logits(work / computed) - wanted).abs().max() < 1e-4, name
        before, after = (dict(tools.tensors(each)) for each in (folder, work / "exported"))
        assert before.keys() == after.keys()
        assert all(torch.equal(after[each], tensor) for each, tensor in before.items())
        config = json.loads((work / "exported" / "config.json").read_text())
        assert config == json.loads((folder / "config.json").read_text())
        run = json.loads((work / "exported" / "run.json").read_text())
        assert run["metrics"]["tensors_carried"] == len(carried(name, before)) > 12


def test_experts_that_are_tensors_of_their_own_are_read_too(models, tmp_path):
    """As transformers saves those of Qwen3.5; the export has the published form again."""
    folder, _ = models["qwen3.5-moe-vision"]
    saved = folder.with_name(f"{folder.name} as saved")
    names = {name for name, _ in tools.tensors(saved)}
    assert any(".experts.3.gate_proj." in name for name in names)
    tools.run_stages(
        ("convert", ("--pretrained-model-path", saved, "--save", tmp_path / "mlm")),
        ("export", ("--load", tmp_path / "mlm", "--export-dir", tmp_path / "hf")),
    )
    before, after = (dict(tools.tensors(each)) for each in (folder, tmp_path / "hf"))
    assert after.keys() == before.keys() - FURTHER.keys()
    assert all(torch.equal(after[each], before[each]) for each in after)


def test_quantized_it_keeps_what_sees_images_in_16_bits(models, tmp_path):
    lines = (json.dumps({"text": f"line {i}: " + "some text " * 9}) for i in range(20))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    jobs = []
    for name, (folder, _) in models.items():
        work = tmp_path / name
        jobs += [
            (
                "quantize",
                (
                    *("--pretrained-model-path", folder, "--save", work / "megatron"),
                    *("--calib-dataset-path-or-name", tmp_path / "text.jsonl", "--skip-generate"),
                    *("--calib-size", 8, "--calib-max-sequence-length", 64),
                    *("--export-quant-cfg", "fp8"),
                ),
            ),
            ("export", ("--load", work / "megatron", "--export-dir", work / "exported")),
        ]
    tools.run_stages(*jobs)
    packed = {
        "llama4-vision": "language_model.model.layers.1.feed_forward.experts.3.gate_proj",
        "mistral3-vision": "language_model.model.layers.0.self_attn.q_proj",
        "qwen3.5-vision": "model.language_model.layers.0.linear_attn.in_proj_z",
        "qwen3.5-moe-vision": "model.language_model.layers.1.mlp.experts.3.gate_proj",
    }
    plain = {
        "llama4-vision": {"vision_model.model.layers.*", "multi_modal_projector.linear_1"},
        "mistral3-vision": {"vision_tower.transformer.layers.*"},
        "qwen3.5-vision": {
            "model.visual.blocks.*",
            "mtp.layers.0.*",
            "model.language_model.layers.0.linear_attn.in_proj_b",
        },
        "qwen3.5-moe-vision": {"model.language_model.layers.0.mlp.shared_expert_gate"},
    }
    for name, (folder, _) in models.items():
        before, after = (
            dict(tools.tensors(each)) for each in (folder, tmp_path / name / "exported")
        )
        assert all(torch.equal(after[each], before[each]) for each in carried(name, before))
        assert after[f"{packed[name]}.weight"].dtype == torch.float8_e4m3fn
        config = json.loads((tmp_path / name / "exported" / "config.json").read_text())
        assert plain[name] <= set(config["quantization_config"]["ignore"])


@pytest.mark.parametrize(
    ("stage", "flags", "parts"),
    [
        ("quantize", ("--export-quant-cfg", "INT8_DEFAULT_CFG"), ["rows", "fp8 and nvfp4"]),
        ("quantize", ("--recipe", "general/ptq/fp8_default-kv_fp8"), ["rows", "a format's name"]),
        ("prune", ("--prune-export-config", '{"hidden_size": 64}'), ["pattern of rotation"]),
        ("convert", ("--context-parallel-size", 2), ["CP=2", "chunks"]),
    ],
)
def test_what_cannot_be_done_is_refused_before_the_work(model, tmp_path, stage, flags, parts):
    where = ("--pretrained-model-path", model[0], "--save", tmp_path / "refused")
    done = tools.run(f"{stage}.py", *where, *flags, "--check", code=2)
    for part in parts:
        assert part in done.stderr


def test_end_tokens_are_those_of_the_text_model(model, tmp_path):
    folder, _ = model
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = [7, 8]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert huggingface.end_tokens(tmp_path) == [7, 8]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"text_config": None}, "text_config = None"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ],
)
def test_what_its_configuration_cannot_say_is_refused(model, changes, shown):
    config = json.loads((model[0] / "config.json").read_text())
    with pytest.raises(UsageError, match=shown):
        families.from_huggingface({**config, **changes})


def test_the_text_model_of_mistral_3_may_be_an_earlier_one(models):
    config = json.loads((models["mistral3-vision"][0] / "config.json").read_text())
    found = families.from_huggingface(config)
    assert (found.attention_temperature or {})["scale"] == 0.3
    text = tools.FAMILIES["mistral"].tiny_config(max_position_embeddings=8192)
    found = families.from_huggingface({**config, "text_config": text})
    of_text = tools.FAMILIES["mistral"].read(text)
    assert {each.name for each in found.differences(of_text)} == {"huggingface_architecture"}
    absent = {key: text[key] for key in text.keys() - {"head_dim", "rms_norm_eps"}}
    found = families.from_huggingface({**config, "text_config": absent})
    assert found.differences(tools.FAMILIES["mistral"].read(absent))[1:] == []
    for changes, shown in (
        ({"text_config": {**text, "model_type": "mixtral"}}, "model_type = 'mixtral'"),
        ({"text_config": {k: v for k, v in text.items() if k != "sliding_window"}}, "window"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ):
        with pytest.raises(UsageError, match=shown):
            families.from_huggingface({**config, "text_config": text, **changes})


def test_what_llama_4_would_compute_otherwise_is_refused():
    from transformers import AutoConfig

    config = AutoConfig.for_model(**tools.FAMILIES["llama4"].tiny_config()).to_dict()
    for key, value in (
        ("num_experts_per_tok", 2),
        ("no_rope_layers", [1, 0]),
        ("moe_layers", []),
        ("attention_chunk_size", None),
    ):
        with pytest.raises(UsageError, match=key):
            families.from_huggingface({**config, key: value})
