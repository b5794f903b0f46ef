"""Attaching a draft: its configuration follows the target's, and the target stays what it was."""

from __future__ import annotations

import json

import pytest
import tools
import torch

from post_training.common import manifest
from post_training.common.errors import UsageError
from post_training.drafts.eagle3 import draft
from post_training.drafts.eagle3.draft import Draft
from post_training.models.families.registry import from_huggingface

QWEN3 = tools.FAMILIES["qwen3"].tiny_config()
LLAMA3 = tools.FAMILIES["llama3"].tiny_config()


def test_the_configuration_follows_the_target():
    config = draft.configuration(from_huggingface(QWEN3))
    assert config["hidden_size"] == 128
    assert config["head_dim"] == 64  # not hidden_size / heads = 32
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert config["intermediate_size"] == 256
    assert config["max_position_embeddings"] == 256
    assert config["rms_norm_eps"] == 1e-6
    assert config["vocab_size"] == config["draft_vocab_size"] == 512
    assert config["rope_theta"] == config["rope_scaling"]["rope_theta"] == 10000.0


def test_rotary_scaling_of_llama_3_is_the_drafts_too():
    config = draft.configuration(from_huggingface(LLAMA3))
    assert config["max_position_embeddings"] == 131072
    assert config["rope_scaling"] == LLAMA3["rope_parameters"]


@pytest.mark.parametrize(
    ("layers", "ids"),
    [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (4, [0, 1, 2]), (6, [0, 2, 4]), (28, [1, 13, 24])],
)
def test_auxiliary_layers_are_distinct(layers, ids):
    assert draft.aux_layer_ids(layers) == ids


def test_the_keys_are_modelopts():
    from modelopt.torch.speculative.config import eagle3_default_config

    own = {"draft_vocab_size", "max_position_embeddings", *draft.TARGETS}
    assert draft.configuration(from_huggingface(QWEN3)).keys() - own == eagle3_default_config.keys()


def test_a_record_reads_itself_back():
    config = draft.configuration(from_huggingface(QWEN3), {"num_hidden_layers": 2})
    made = Draft("eagle3", config, [0, 2, 4], ttt_steps=5)
    content = json.loads(json.dumps(made.to_json()))
    assert Draft.from_json({**content, "of_a_newer_version": 1}) == made


REFUSED = {
    "unknown key": ({"num_layers": 2}, "num_layers: 2", "num_hidden_layers"),
    "the target's": ({"hidden_size": 64}, "hidden_size: 64", "it is the target's"),
    "wrong type": ({"num_hidden_layers": "2"}, 'num_hidden_layers: "2"', "int"),
    "a boolean is no number": ({"head_dim": True}, "head_dim: true", "int"),
    "heads": ({"num_key_value_heads": 3}, "num_key_value_heads: 3", "divisor"),
    "not EAGLE-3": ({"use_aux_hidden_state": False}, "use_aux_hidden_state: False", "leave it out"),
    "layer": ({"eagle_aux_hidden_state_layer_ids": [1, 6]}, "[1, 6]", "0 to 5"),
    "order": ({"eagle_aux_hidden_state_layer_ids": [3, 1]}, "[3, 1]", "[1, 3]"),
    "vocabulary": ({"draft_vocab_size": 513}, "draft_vocab_size: 513", "512 tokens"),
    "activation": ({"hidden_act": "gelu"}, "hidden_act: gelu", "'silu' only"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_configuration_that_cannot_work_is_refused(case):
    overrides, what, hint = REFUSED[case]
    with pytest.raises(UsageError) as caught:
        draft.configuration(from_huggingface(QWEN3), overrides)
    assert what in str(caught.value)
    assert hint in str(caught.value)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A drafted checkpoint, made at TP=2, and one without the target's layers."""
    folder = tmp_path_factory.mktemp("drafted")
    model = tools.random_model(folder / "hf", "qwen3")
    ids = tools.tokens()
    torch.save(tools.transformers_logits(model, ids), folder / "expected.pt")
    (folder / "eagle.json").write_text('{"draft_vocab_size": 300, "num_hidden_layers": 2}')
    source = ("--pretrained-model-path", folder / "hf", "--fp32", "--algorithm", "eagle3")
    tools.run_stages(
        ("convert", (*source, "--save", folder / "drafted", *tools.LAYOUTS["TP=2"][1],
                     "--eagle-config", folder / "eagle.json", "--mix-hidden-states", "false")),
        tools.logits_job(folder / "TP=2", ids, "--load", folder / "drafted", "--fp32",
                         *tools.LAYOUTS["TP=2"][1]),
        processes=2,
    )  # fmt: skip
    pipeline = tools.LAYOUTS["PP=2"][1]
    tools.run_stages(
        tools.logits_job(folder / "PP=2", ids, "--load", folder / "drafted", "--fp32", *pipeline),
        ("convert", ("--load", folder / "drafted", "--save", folder / "again", "--fp32",
                     *pipeline)),
        processes=2,
    )  # fmt: skip
    tools.run_stages(
        ("convert", (*source, "--save", folder / "offline", "--export-offline-model")),
        ("convert", (*source, "--draft-model-path", folder / "offline", "--save",
                     folder / "joined")),
        tools.logits_job(folder / "joined-logits", ids, "--load", folder / "joined", "--fp32"),
    )  # fmt: skip
    return folder


def tensors(folder):
    """Every tensor of a checkpoint by its name."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(folder / "release"))
    entries = reader.read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize("layout", ["TP=2", "PP=2"])
def test_a_drafted_checkpoint_loads_at_any_layout_and_its_target_is_unchanged(work, layout):
    expected = torch.load(work / "expected.pt")
    assert (tools.read_logits(work / layout) - expected).abs().max() < 1e-4


def test_the_manifest_says_without_torch_that_there_is_a_draft(work):
    recorded = Draft.from_json(manifest.read(work / "drafted")["draft"])
    assert recorded.has_own_vocabulary
    assert recorded.config["num_hidden_layers"] == 2
    assert recorded.mix_hidden_states is False
    assert Draft.from_json(manifest.read(work / "again")["draft"]) == recorded
    assert manifest.read(work / "drafted")["metrics"]["draft_parameters"] > 0


def test_every_parameter_of_the_draft_is_initialised(work):
    found = {n: t for n, t in tensors(work / "drafted").items() if n.startswith("eagle_module.")}
    assert found.pop("eagle_module.d2t").shape == (300,)
    assert "eagle_module.fc.weight" in found
    for name, tensor in found.items():
        if "norm" in name:
            assert torch.equal(tensor, torch.ones_like(tensor)), name
        else:
            # 0.02, divided by sqrt(2 layers x 2) where a layer's output is added to its input.
            assert 0.008 < tensor.std() < 0.022, name
            assert abs(tensor.mean()) < 0.001, name


def test_a_draft_survives_another_layout(work):
    before, after = tensors(work / "drafted"), tensors(work / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_offline_checkpoint_leaves_out_the_layers_and_joins_its_target_again(work):
    offline, joined = tensors(work / "offline"), tensors(work / "joined")
    assert not any(name.startswith("decoder.layers") for name in offline)
    assert any(name.startswith("decoder.layers") for name in joined)
    assert all(torch.equal(tensor, joined[name]) for name, tensor in offline.items())
    assert not manifest.read(work / "joined")["draft"]["offline"]
    expected = torch.load(work / "expected.pt")
    assert (tools.read_logits(work / "joined-logits") - expected).abs().max() < 1e-4


def test_mistakes_end_with_exit_code_2_and_one_message(work, tmp_path):
    (tmp_path / "eagle.json").write_text('{"num_layer": 2}')
    (tmp_path / "broken.json").write_text("{")
    target = ("--pretrained-model-path", work / "hf", "--save", tmp_path / "new")
    eagle3 = (*target, "--algorithm", "eagle3")
    cases = [
        ((*target, "--draft-vocab-size", 8), "--draft-vocab-size", "--algorithm eagle3"),
        ((*eagle3, "--draft-vocab-size", 513), "--draft-vocab-size 513", "1 to 512"),
        ((*eagle3, "--eagle-config", tmp_path / "eagle.json"), "num_layer: 2", "num_hidden_layers"),
        (
            (*eagle3, "--eagle-config", tmp_path / "broken.json"),
            "broken.json",
            "cannot be read as JSON",
        ),
        ((*eagle3, "--mix-hidden-states", "maybe"), "maybe", "neither true nor false"),
        ((*eagle3, "--draft-model-path", work / "hf"), "--draft-model-path", "MODEL"),
        (
            ("--load", work / "drafted", "--save", tmp_path / "new", "--algorithm", "eagle3"),
            "drafted",
            "eagle3.sh",
        ),
    ]
    for words, what, hint in cases:
        done = tools.run("convert.py", *words, code=2)
        assert what in done.stderr and hint in done.stderr, done.stderr
    done = tools.run("mmlu.py", "--load", work / "offline", "--check", code=2)
    assert "--draft-model-path" in done.stderr
