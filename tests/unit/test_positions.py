"""Rotary frequencies of every family and scaling, beside those of its transformers model."""

from __future__ import annotations

import pytest
import tools
import torch

from post_training.common.errors import UsageError
from post_training.drafts.eagle3 import draft
from post_training.models import rotary
from post_training.models.families import registry as families

SCALED = {scaled["rope_parameters"]["rope_type"]: scaled for _, scaled in tools.ROTARY.values()}
LENGTHS = (8, 48, 200)
# Latent attention has YaRN alone, Phi-3 longrope, Nemotron-H no positions, Ministral 3 a factor of
# queries among the rotary values.
PLAIN = [
    name
    for name, family in tools.FAMILIES.items()
    if "multi-latent attention" not in family.parts
    and name not in ("phi3", "nemotron-h", "ministral3")
]


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3"])
@pytest.mark.parametrize("family", PLAIN)
def test_frequencies_are_those_of_the_transformers_model(family, kind):
    from transformers import AutoConfig, AutoModel

    stated = {"rope_theta": 20000.0, **SCALED[kind]["rope_parameters"]}
    of_tiny = tools.FAMILIES[family].tiny.get("rope_parameters", {})
    stated |= {key: of_tiny[key] for key in ("partial_rotary_factor",) if key in of_tiny}
    changes = {"rope_parameters": stated, "max_position_embeddings": 32, "num_hidden_layers": 1}
    of_kind = of_tiny.keys() & {"full_attention"}
    if of_kind:
        types = ["sliding_attention", *of_kind]
        changes |= {"rope_parameters": {"full_attention": stated}, "layer_types": types}
        changes["num_hidden_layers"] = 2
    # Their only layer has experts.
    dense = {"mlp_only_layers": [], "interleave_moe_layer_step": 1, "first_k_dense_replace": 0}
    changes |= {key: dense[key] for key in tools.FAMILIES[family].tiny.keys() & dense.keys()}
    # Without a head size of the file transformers 5.14 fails at dynamic scaling of Mixtral.
    changes |= {"head_dim": 32} if family == "mixtral" else {}
    config = tools.FAMILIES[family].tiny_config(**changes)
    found = families.from_huggingface(AutoConfig.for_model(**config).to_dict())
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(**config))
    reference = type(model.rotary_emb)(model.config)
    dim = int(found.value("kv_channels") * found.rotary_percent)
    # transformers rotates a text that is shorter than one before it by that one's length.
    for length in LENGTHS:
        reference(torch.zeros(1), torch.arange(length)[None], *of_kind)
        lengths = (length,) if kind == "dynamic" else ()
        frequencies = getattr(rotary, kind)(found.rope_parameters, found.rotary_base, dim, *lengths)
        prefix = "".join(f"{each}_" for each in of_kind)
        assert getattr(reference, f"{prefix}attention_scaling") == 1.0
        wanted = getattr(reference, f"{prefix}inv_freq")
        torch.testing.assert_close(frequencies, wanted, rtol=1e-6, atol=0)
    assert frequencies[-1] < 0.9 * rotary.linear({"factor": 1.0}, found.rotary_base, dim)[-1]


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
DEFAULT = {"rope_type": "default", "rope_theta": 10000.0}
KINDS = {"full_attention": DEFAULT, "sliding_attention": DEFAULT}


@pytest.mark.parametrize(
    ("family", "changes", "base", "local"),
    [
        # As published: the scaling is that of full layers, whose factor follows from the scaling.
        (
            "olmo3",
            {
                "rope_parameters": None,
                "rope_theta": 500000,
                "rope_scaling": {**YARN, "attention_factor": 1.2079441541679836},
            },
            500000.0,
            500000.0,
        ),
        ("olmo3", {"rope_parameters": None}, 500000.0, None),
        ("olmo3", {"rope_parameters": KINDS}, 10000.0, None),
        ("gemma3", {"rope_parameters": None}, 1000000.0, 10000.0),
        (
            "gemma3",
            {"rope_parameters": None, "rope_theta": 500000, "rope_local_base_freq": 20000},
            500000.0,
            20000.0,
        ),
    ],
)
def test_layers_within_a_window_are_rotated_by_their_own_base(family, changes, base, local):
    config = {**tools.FAMILIES[family].tiny_config(), **changes}
    found = families.from_huggingface(config)
    assert (found.rotary_base, found.local_rotary_base) == (base, local)
    assert (found.yarn is not None) == ("rope_scaling" in changes)


@pytest.mark.parametrize(
    ("family", "changes", "shown"),
    [
        ("olmo3", {"rope_parameters": None, "rope_theta": 10000.0}, "vLLM this one"),
        (
            "olmo3",
            {"rope_parameters": {"full_attention": {**YARN, "attention_factor": 1.3}}},
            "attention_factor = 1.3",
        ),
        (
            "gemma3",
            {"rope_parameters": {**KINDS, "sliding_attention": {**YARN}}},
            "'yarn' of layers within a window",
        ),
        ("gemma3", {"rope_parameters": DEFAULT}, "each kind of layer"),
        ("gemma3", {"sliding_window": 0}, "sliding_window = 0"),
        ("minimax-m2", {"rotary_dim": 16}, "partial_rotary_factor = 0.5"),
        ("minimax-m2", {"attn_type_list": [1, 0]}, "lightning"),
    ],
)
def test_positions_that_readers_understand_differently_are_refused(family, changes, shown):
    with pytest.raises(UsageError, match=shown):
        families.from_huggingface({**tools.FAMILIES[family].tiny_config(), **changes})


def test_phi_3_has_other_frequencies_for_long_texts():
    from transformers import AutoConfig, AutoModel

    changes = {**tools.ROTARY["longrope"][1], "num_hidden_layers": 1}
    config = AutoConfig.for_model(**tools.FAMILIES["phi3"].tiny_config(**changes))
    found = families.from_huggingface(config.to_dict())
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    reference = type(model.rotary_emb)(model.config)
    for length in (8, 52, 53, 200):
        reference(torch.zeros(1), torch.arange(length)[None])
        frequencies = rotary.longrope(found.rope_parameters, found.rotary_base, 24, length)
        torch.testing.assert_close(frequencies, reference.inv_freq, rtol=1e-6, atol=0)
    assert found.rope_parameters["attention_factor"] == reference.attention_scaling > 1.1
    first = {**config.rope_parameters, "rope_type": "su"}
    assert families.from_huggingface({**config.to_dict(), "rope_parameters": first}) == found
    with pytest.raises(UsageError, match="longrope"):
        draft.configuration(found)


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"short_factor": [1.0] * 11}, "short_factor"),
        ({"long_factor": [0.0] * 12}, "long_factor"),
        ({"original_max_position_embeddings": 51}, "original_max_position_embeddings"),
        ({"attention_factor": "2"}, "attention_factor"),
    ],
)
def test_frequencies_of_long_texts_that_cannot_be_are_refused(changes, shown):
    stated = tools.ROTARY["longrope"][1]
    rope = {**stated["rope_parameters"], "rope_theta": 10000.0, **changes}
    config = {**tools.FAMILIES["phi3"].tiny_config(**stated), "rope_parameters": rope}
    with pytest.raises(UsageError, match=shown):
        families.from_huggingface(config)


def test_minimax_rotates_what_its_files_say():
    config = tools.FAMILIES["minimax-m2"].tiny_config(rope_parameters=DEFAULT, rotary_dim=16)
    assert families.from_huggingface(config).rotary_percent == 0.25
    del config["rotary_dim"]
    assert families.from_huggingface(config).rotary_percent == 1.0


@pytest.mark.parametrize("kind", ["linear", "dynamic", "llama3", "yarn"])
def test_scalings_that_transformers_does_not_read_are_refused(kind):
    with pytest.raises(UsageError, match=f"(?s)rope type '{kind}'.*longrope alone"):
        families.from_huggingface(tools.FAMILIES["phi3"].tiny_config(**SCALED[kind]))


def test_neighbouring_values_are_not_rotated_by_yarn():
    stated = {"rope_theta": 10000.0, **SCALED["yarn"]["rope_parameters"]}
    with pytest.raises(UsageError, match="neighbouring"):
        families.from_huggingface(tools.FAMILIES["ernie4.5"].tiny_config(rope_parameters=stated))


@pytest.mark.parametrize(
    ("family", "changes", "shown"),
    [
        ("qwen3", SCALED["dynamic"], "dynamic"),
        ("granite", {}, "multipliers"),
        ("gemma3", {}, "multipliers"),
        ("olmo3", {}, "yarn"),
    ],
)
def test_targets_whose_drafts_would_compute_something_else_get_none(family, changes, shown):
    config = tools.FAMILIES[family].tiny_config(**changes)
    with pytest.raises(UsageError, match=shown):
        draft.configuration(families.from_huggingface(config))
