"""Every registered family, by its tiny configuration: read, written back, refused, counted.

A new family is tested here, in ``tests/parallel/test_logits.py`` and in
``tests/stages/test_convert_export.py`` by being registered.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from post_training.common.errors import UsageError
from post_training.models import parameter_count
from post_training.models.architecture import Architecture
from post_training.models.families import registry as families

FAMILIES = {each.name: each for each in families.FAMILIES.values() if not each.prefix}


def written(family, folder, **changes):
    """The tiny model's ``config.json`` as transformers writes it."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**family.tiny_config(**changes))
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def rotates(family):
    """Whether its models know positions; keys of a rotation mean nothing in others."""
    return family.read(family.tiny_config()).position_embedding_type != "none"


def by_kind(family):
    """Whether layers within a window are rotated by their own values in ``rope_parameters``."""
    return "full_attention" in family.tiny.get("rope_parameters", {})


def lists_layers(family):
    """Whether a list of layers says how many there are, whatever the number in the file."""
    return family.read(family.tiny_config()).is_hybrid


def test_names_are_unique():
    names = {each.name for each in families.FAMILIES.values()}
    assert len(names) == len(families.FAMILIES)


def test_what_transformers_writes_is_read(family, tmp_path):
    config = written(family, tmp_path)
    found = families.from_huggingface(config)
    assert found.huggingface_architecture == family.architecture
    assert found.value("num_layers") == family.tiny_config()["num_hidden_layers"]
    assert Architecture.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_older_form_of_rotary_positions_is_read_like_transformers_own(family, tmp_path):
    if not rotates(family):
        pytest.skip("no positions")
    config = written(family, tmp_path)
    whole = rope = config.pop("rope_parameters")
    older = dict(config)
    if by_kind(family):
        older["rope_local_base_freq"] = whole["sliding_attention"]["rope_theta"]
        rope = whole["full_attention"]
    older |= {"rope_theta": rope["rope_theta"], "rope_scaling": rope}
    assert families.from_huggingface(older) == family.read({**config, "rope_parameters": whole})
    older["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    del older["rope_scaling"]["rope_type"]
    assert families.from_huggingface(older) == family.read({**config, "rope_parameters": whole})


def test_it_has_as_many_parameters_as_the_transformers_model(family):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = family.tiny_config()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count.total(families.from_huggingface(config)) == count


def test_the_sizes_of_a_pruned_model_come_back(family, tmp_path):
    config = written(family, tmp_path)
    whole = families.from_huggingface(config)
    assert families.with_shape(config, whole.resolved()) == config
    small = families.from_huggingface({**config, "num_hidden_layers": 3, "hidden_size": 64})
    values = {**small.resolved(), "kv_channels": whole.value("kv_channels")}
    shaped = families.with_shape(config, values, kept_layers=[1, 2, 6])
    again = families.from_huggingface(shaped)
    assert {name: again.value(name) for name in small.transformer} == {
        name: values[name] for name in small.transformer
    }
    for key in family.per_layer_keys:
        assert len(shaped.get(key) or [0] * 3) == 3


def test_each_value_that_it_refuses_is_named(family):
    for key, only, meaning in family.refused:
        other = not only if isinstance(only, bool) else f"no {only}"
        other = 10 * only if isinstance(only, float) else other
        with pytest.raises(UsageError) as refused:
            families.from_huggingface(family.tiny_config(**{key: other}))
        assert f"{key} = {other!r}" in str(refused.value)
        assert meaning in str(refused.value)


@pytest.mark.parametrize("how", ["absent", "null"])
def test_a_key_that_is_absent_or_null_means_what_it_means_to_transformers(family, tmp_path, how):
    from transformers import AutoConfig

    # Twice the heads of other tiny models, which are as many as some families' default.
    config = written(family, tmp_path, num_attention_heads=8)
    for key in sorted(config.keys() - {"architectures", "model_type"}):
        stated = {k: v for k, v in config.items() if k != key}
        stated |= {} if how == "absent" else {key: None}
        (tmp_path / "config.json").write_text(json.dumps(stated))
        try:
            AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path)
        except Exception:  # transformers refuses it, with errors of its own
            continue
        filled = json.loads((tmp_path / "config.json").read_text())
        try:
            found = families.from_huggingface(stated)
        except UsageError:
            continue
        assert found.differences(families.from_huggingface(filled)) == [], key


def test_a_null_in_place_of_true_is_refused(family):
    """transformers takes it for false, and not for the default."""
    for key, default in family.defaults.items():
        if default is True:
            with pytest.raises(UsageError, match=f"{key} = null"):
                families.from_huggingface(family.tiny_config(**{key: None}))


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"is_causal": False}, "is_causal = False"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_key_value_heads": 3}, "4 attention heads"),
        ({"intermediate_size": None}, "intermediate_size = None"),
        ({"vocab_size": "512"}, "vocab_size = '512'"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6'"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps = 0.0"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 0.0}}, "rope_theta = 0"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false'"),
        ({"layer_types": ["linear_attention"] * 6}, "linear_attention"),
        ({"rope_parameters": ROPE, "rope_scaling": {"type": "linear", "factor": 2.0}}, "differ"),
        ({"rope_parameters": {"full_attention": ROPE}}, "rope_parameters of full_attention"),
        (
            {"rope_parameters": None, "rope_scaling": LLAMA3},
            "original_max_position_embeddings = None",
        ),
    ],
)
def test_a_value_that_changes_the_model_is_refused_by_name(family, changes, shown):
    if any("rope" in key for key in changes) and not rotates(family):
        pytest.skip("no positions")
    if "layer_types" in changes and lists_layers(family):
        pytest.skip("its linear_attention is a Mamba layer")
    if "layer_types" in changes and "gated delta nets" in family.parts:
        changes, shown = {"layer_types": ["sliding_attention"] * 6}, "sliding_attention"
    if "num_hidden_layers" in changes and lists_layers(family):
        changes, shown = {"hybrid_override_pattern": "M-X"}, "layers X"
    if by_kind(family) and changes.get("rope_parameters"):
        if "full_attention" in changes["rope_parameters"]:
            pytest.skip("its layers are rotated by their kind")
        changes = {**changes, "rope_parameters": {"full_attention": changes["rope_parameters"]}}
    if "intermediate_size" in changes and "ffn_hidden_size" not in family.keys:
        pytest.skip("all its layers have experts")
    epsilon = family.keys["layernorm_epsilon"]
    changes = {epsilon if key == "rms_norm_eps" else key: changes[key] for key in changes}
    shown = shown.replace("rms_norm_eps", epsilon)
    with pytest.raises(UsageError) as refused:
        families.from_huggingface(family.tiny_config(**changes))
    # Families with YaRN refuse Llama 3's scaling as a whole.
    assert shown in str(refused.value) or "rope type 'llama3'" in str(refused.value)


def test_partial_rotation_is_read_only_where_transformers_heeds_it(family):
    if not rotates(family):
        pytest.skip("no positions")
    rope = {**ROPE, "partial_rotary_factor": 0.5}
    config = family.tiny_config(
        rope_parameters={"full_attention": rope} if by_kind(family) else rope
    )
    if family.partial_rotary:
        assert families.from_huggingface(config).rotary_percent == 0.5
    else:
        with pytest.raises(UsageError, match=r"partial_rotary_factor = 0\.5"):
            families.from_huggingface(config)


@pytest.mark.parametrize(
    ("name", "changes", "shown"),
    [
        ("mixtral", {"num_experts_per_tok": 9}, "each token needs 9"),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ("mixtral", {"num_experts": 3}, "num_experts = 3"),
        ("qwen3-moe", {"num_experts_per_tok": 1}, "num_experts_per_tok = 1"),
        ("deepseek-v3", {"n_group": 8}, "n_group = 8, topk_group = 2 of 8 experts"),
        ("deepseek-v3", {"n_group": 3}, "equal groups"),
        ("deepseek-v3", {"routed_scaling_factor": 0.0}, "routed_scaling_factor = 0.0"),
        ("nemotron-h", {"n_group": 8}, "n_group = 8"),
        ("nemotron-h", {"moe_latent_size": True}, "moe_latent_size = True"),
        ("nemotron-h", {"ssm_state_size": 0}, "ssm_state_size = 0"),
        ("gpt-oss", {"rope_parameters": {}}, "without a rope_type"),
        ("gpt-oss", {"rope_parameters": {"rope_type": "yarn", "factor": 32.0}}, "original_max"),
        ("granite", {"attention_multiplier": 0.0}, "attention_multiplier = 0.0"),
        ("qwen3-next", {"linear_num_value_heads": 3}, "linear_num_value_heads = 3"),
        ("qwen3-next", {"linear_key_head_dim": 0}, "linear_key_head_dim = 0"),
        ("qwen3-next", {"full_attention_interval": 0}, "full_attention_interval = 0"),
    ],
)
def test_a_value_of_a_familys_own_that_cannot_be_is_refused(name, changes, shown):
    with pytest.raises(UsageError) as refused:
        families.from_huggingface(FAMILIES[name].tiny_config(**changes))
    assert shown in str(refused.value)


def test_gated_delta_nets_may_be_stated_by_the_interval_of_attention():
    found = families.from_huggingface(FAMILIES["qwen3-next"].tiny_config())
    assert found.value("linear_attention_freq") == [1, 1, 0, 1, 1, 0]
    flags = {"linear_attention_freq": 3, "experimental_attention_variant": "gated_delta_net"}
    assert found.contradictions(flags) == []
    stated = dataclasses.replace(found, transformer={**found.transformer, **flags})
    assert stated.differences(found) == []
    assert len(found.contradictions({"linear_attention_freq": 2})) == 1


def test_one_expert_for_each_token_is_read_where_its_weight_is_a_probability():
    config = FAMILIES["qwen3-moe"].tiny_config(num_experts_per_tok=1, norm_topk_prob=False)
    assert families.from_huggingface(config).value("moe_router_topk") == 1


def test_a_size_that_the_file_leaves_to_the_default_is_written_after_pruning():
    config = FAMILIES["qwen3-moe"].tiny_config()
    del config["moe_intermediate_size"]
    values = families.from_huggingface(config).resolved() | {"moe_ffn_hidden_size": 32}
    assert families.with_shape(config, values)["moe_intermediate_size"] == 32


def test_the_size_of_pruned_experts_is_written_under_the_familys_key():
    config = FAMILIES["mixtral"].tiny_config()
    values = families.from_huggingface(config).resolved() | {"moe_ffn_hidden_size": 32}
    assert families.with_shape(config, values)["intermediate_size"] == 32


HYBRID = FAMILIES["nemotron-h"]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"hybrid_override_pattern": ""}, "layers"),
        ({"layers_block_type": ["mamba", "rwkv"]}, "layers rwkv"),
        ({"mamba_num_heads": 7}, "mamba_num_heads = 7"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit = [0.0, 0.1]"),
        ({"num_experts_per_tok": 9}, "each token needs 9"),
        ({"norm_topk_prob": False}, "norm_topk_prob = False"),
        ({"num_experts_per_tok": 2}, "topk_group = 2"),
    ],
)
def test_a_hybrid_that_megatron_computes_otherwise_is_refused(changes, shown):
    with pytest.raises(UsageError) as refused:
        families.from_huggingface(HYBRID.tiny_config(**changes))
    assert shown in str(refused.value)


def test_layers_of_a_hybrid_are_read_in_each_form_of_the_file():
    config = HYBRID.tiny_config()
    pattern = config.pop("hybrid_override_pattern")
    wanted = families.from_huggingface({**config, "hybrid_override_pattern": pattern})
    new = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
    old = new | {"M": "mamba", "*": "attention"}
    for names in (new, old):
        kinds = [names[letter] for letter in pattern]
        assert families.from_huggingface({**config, "layers_block_type": kinds}) == wanted
    config["n_routed_experts"] = 7  # of which layers without experts know nothing
    plain = families.from_huggingface({**config, "hybrid_override_pattern": "M-*-"})
    assert plain.value("num_moe_experts") is None
    assert plain.value("num_layers") == 4


def test_quantized_weights_are_refused(family):
    config = family.tiny_config(quantization_config={"quant_method": "awq", "bits": 4})
    with pytest.raises(UsageError, match="already quantized"):
        families.from_huggingface(config)


def test_a_hub_models_flags_are_refused_only_where_no_family_has_such_parts(family):
    assert families.unconvertible({}) is None
    known = {part for each in FAMILIES.values() for part in each.parts}
    for part in families.PARTS.keys() - known:
        reason = families.unconvertible({families.PARTS[part][0]: 8})
        assert reason is not None
        assert part in reason
        assert family.architecture in reason
    for part in family.parts:
        assert families.unconvertible({families.PARTS[part][0]: 8}) is None
