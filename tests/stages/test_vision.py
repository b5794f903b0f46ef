"""A model that sees images: its text model is converted, the rest travels bit for bit."""

from __future__ import annotations

import json

import pytest
import tools
import torch

from post_training.checkpoints import huggingface
from post_training.common.errors import UsageError
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
ARCHITECTURE = "Llama4ForConditionalGeneration"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder in bf16, and the transformers model in float32."""
    from transformers import AutoConfig, Llama4ForConditionalGeneration

    folder = tmp_path_factory.mktemp("vision") / "model"
    text = tools.FAMILIES["llama4"].tiny_config(num_hidden_layers=4, no_rope_layer_interval=2)
    config = AutoConfig.for_model("llama4", text_config=text, vision_config=VISION)
    torch.manual_seed(0)
    model = Llama4ForConditionalGeneration(config).to(torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.08)
    model.save_pretrained(folder)
    tools.chat_tokenizer().save_pretrained(folder)
    # Cast in place it would round its rotary frequencies.
    return folder, type(model).from_pretrained(folder, dtype=torch.float32).eval()


def test_the_text_model_computes_and_everything_comes_back(model, tmp_path):
    folder, reference = model
    ids = tools.tokens()
    jobs = (
        ("convert", ("--pretrained-model-path", folder, "--save", tmp_path / "megatron")),
        ("export", ("--load", tmp_path / "megatron", "--export-dir", tmp_path / "exported")),
        tools.logits_job(tmp_path / "logits", ids, "--load", tmp_path / "megatron", "--fp32"),
        tools.logits_job(
            *(tmp_path / "fused", ids, "--pretrained-model-path", folder, "--fp32"),
            "--export-default-te-spec",
        ),
    )
    tools.run_stages(*jobs)
    wanted = tools.transformers_logits(reference, ids)
    assert wanted.std() > 0.5
    for name in ("logits", "fused"):
        assert (tools.read_logits(tmp_path / name) - wanted).abs().max() < 1e-4
    before, after = (dict(tools.tensors(each)) for each in (folder, tmp_path / "exported"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config == json.loads((folder / "config.json").read_text())
    carried = [name for name in before if not name.startswith("language_model.")]
    run = json.loads((tmp_path / "exported" / "run.json").read_text())
    assert run["metrics"]["tensors_carried"] == len(carried) > 40


def test_quantized_it_keeps_what_sees_images_in_16_bits(model, tmp_path):
    folder, _ = model
    lines = (json.dumps({"text": f"line {i}: " + "some text " * 9}) for i in range(20))
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    source = ("--pretrained-model-path", folder)
    tools.run_stages(
        (
            "quantize",
            (
                *(*source, "--save", tmp_path / "megatron", "--export-quant-cfg", "fp8"),
                *("--calib-dataset-path-or-name", tmp_path / "text.jsonl", "--skip-generate"),
                *("--calib-size", 8, "--calib-max-sequence-length", 64),
            ),
        ),
        ("export", ("--load", tmp_path / "megatron", "--export-dir", tmp_path / "exported")),
    )
    before, after = (dict(tools.tensors(each)) for each in (folder, tmp_path / "exported"))
    for name, tensor in before.items():
        if not name.startswith("language_model."):
            assert torch.equal(after[name], tensor)
    expert = "language_model.model.layers.1.feed_forward.experts.3.gate_proj"
    assert after[f"{expert}.weight"].dtype == torch.float8_e4m3fn
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    excluded = config["quantization_config"]["ignore"]
    assert {"vision_model.model.layers.*", "multi_modal_projector.linear_1"} <= set(excluded)


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
