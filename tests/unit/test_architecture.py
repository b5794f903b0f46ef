"""Architectures from Hugging Face configurations, flags and manifests, and their agreement."""

from __future__ import annotations

import json
from typing import Any

import pytest
from confs import conf_flags, parse
from released_configs import DEEPSEEK_V3, LLAMA3_SCALING, RELEASED

from post_training.common.errors import UsageError
from post_training.config import model_description
from post_training.models import parameter_count, transformer_fields
from post_training.models.architecture import (
    MLA_FIELDS,
    OWN_FIELDS,
    TRANSFORMER_FIELDS,
    Architecture,
)
from post_training.models.families.registry import from_huggingface

QWEN3 = RELEASED["Qwen/Qwen3-0.6B"]
DEEPSEEK_V2 = {
    **RELEASED["deepseek-ai/DeepSeek-V2-Lite"],
    **{"n_group": 8, "topk_group": 3, "topk_method": "group_limited_greedy"},
}


@pytest.mark.parametrize("conf", RELEASED)
def test_a_conf_states_what_the_released_config_json_says(conf):
    args = parse(*conf_flags(conf))
    from_flags = model_description.architecture(args)
    released = from_huggingface(RELEASED[conf])
    # What Megatron-LM has no flags for.
    unsaid = {"attention_chunks", "attention_temperature", "rope_parameters"}
    unsaid = unsaid if "Llama-4" in conf else set()
    assert {each.name for each in from_flags.differences(released)} <= unsaid
    assert from_flags.max_position_embeddings == released.max_position_embeddings
    assert model_description.architecture(args, RELEASED[conf]) == released


def test_the_quickstarts_conf_is_the_model_that_it_trains(tiny_model):
    config = json.loads((tiny_model / "config.json").read_text())
    args = parse(*conf_flags("quickstart/tiny"))
    assert (
        model_description.architecture(args).differences(
            model_description.architecture(args, config)
        )
        == []
    )


def test_a_config_json_gives_every_field():
    found = from_huggingface(RELEASED["meta-llama/Llama-3.2-1B-Instruct"])
    assert found == Architecture(
        transformer={
            "num_layers": 16,
            "hidden_size": 2048,
            "ffn_hidden_size": 8192,
            "num_attention_heads": 32,
            "num_query_groups": 8,
            "kv_channels": 64,
            "layernorm_epsilon": 1e-05,
            "normalization": "RMSNorm",
            "gated_linear_unit": True,
            "activation_func": "silu",
            "add_bias_linear": False,
        },
        vocab_size=128256,
        max_position_embeddings=131072,
        rotary_base=500000.0,
        rope_scaling=True,
        rope_scaling_factor=32.0,
        share_embeddings_and_output_weights=True,
        huggingface_architecture="LlamaForCausalLM",
    )
    assert from_huggingface(QWEN3).transformer["qk_layernorm"] is True
    assert from_huggingface(RELEASED["Qwen/Qwen2.5-0.5B-Instruct"]).transformer["add_qkv_bias"]


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"architectures": ["Qwen3ForCausalLN"]}, ["Qwen3ForCausalLN", "Did you mean: Qwen3"]),
        ({"architectures": ["BertModel"]}, ["BertModel", "LlamaForCausalLM", "Qwen2ForCausalLM"]),
        ({"architectures": None}, ["None", "Qwen3ForCausalLM"]),
        ({"hidden_act": "gelu"}, ["hidden_act = 'gelu'", "'silu'"]),
        ({"attention_bias": True}, ["attention_bias = True"]),
        ({"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 14},
         ["sliding window of 4096 tokens"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["sliding window"]),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}},
         ["original_max_position_embeddings = None"]),
        ({"rope_scaling": {"type": "yarn", "attention_factor": 1.2}}, ["attention_factor = 1.2"]),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
         ["rope type 'longrope'", "vLLM takes the long ones"]),
        ({"rope_scaling": {"rope_type": "proportional"}}, ["rope type 'proportional'", "linear"]),
        ({"rope_scaling": {"rope_type": "linear"}}, ["factor = None"]),
        ({"rope_scaling": {**LLAMA3_SCALING, "low_freq_factor": 5.0}}, ["low_freq_factor = 5.0"]),
        ({"rope_scaling": LLAMA3_SCALING, "original_max_position_embeddings": 4096},
         ["original_max_position_embeddings = 4096", "8192"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0,
                           "original_max_position_embeddings": 64}},
         ["original_max_position_embeddings = 64", "40960"]),
        ({"num_hidden_layers": "28"}, ["num_hidden_layers = '28'", "whole number"]),
        ({"vocab_size": None}, ["vocab_size = None"]),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ["gptq", "4 bits"]),
        ({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3"}}, ["fp8", "e4m3"]),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
         ["modelopt", "NVFP4", "already quantized"]),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "int"}},
         ["compressed-tensors"]),
    ],
)  # fmt: skip
def test_what_cannot_be_represented_is_refused_by_name(changes, parts):
    with pytest.raises(UsageError) as refused:
        from_huggingface({**QWEN3, **changes})
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("config", "changes", "parts"),
    [
        (DEEPSEEK_V2, {}, ["topk_group = 3 of 8", "num_experts_per_tok = 6", "best experts"]),
        (DEEPSEEK_V2, {"topk_method": "noaux_tc"}, ["topk_method = 'noaux_tc'"]),
        (DEEPSEEK_V3, {"topk_group": 2}, ["topk_group = 2 of 8", "megatron-core by 4"]),
        (DEEPSEEK_V3, {"norm_topk_prob": False}, ["norm_topk_prob = False", "normalizes"]),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, ["norm_topk_prob = True", "does not normalize"]),
        (DEEPSEEK_V3, {"num_key_value_heads": 8}, ["num_key_value_heads = 8"]),
        (DEEPSEEK_V3, {"rms_norm_eps": 1e-5}, ["rms_norm_eps = 1e-05", "engines differ"]),
        (DEEPSEEK_V3, {"rope_interleave": False}, ["rope_interleave = False"]),
        (DEEPSEEK_V3, {"first_k_dense_replace": 61}, ["no layer has experts"]),
        (DEEPSEEK_V3, {"n_shared_experts": 0}, ["without shared experts"]),
        (DEEPSEEK_V3, {"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope type 'linear'"]),
        (DEEPSEEK_V3, {"rope_scaling": {"type": "yarn", "factor": 40, "mscale_all_dim": 1.0}},
         ["mscale = None, mscale_all_dim = 1.0", "state both"]),
        (DEEPSEEK_V3, {"rope_scaling": {"type": "yarn", "factor": 40, "truncate": False}},
         ["truncate = False"]),
        (DEEPSEEK_V3, {"quantization_config": {"quant_method": "fp8", "fmt": "e5m2",
                                                "weight_block_size": [128, 128]}},
         ["only fmt e4m3"]),
    ],
)  # fmt: skip
def test_what_deepseeks_layers_do_differently_is_refused_by_name(config, changes, parts):
    with pytest.raises(UsageError) as refused:
        from_huggingface({**config, **changes})
    for part in parts:
        assert part in str(refused.value)


def test_what_a_deepseek_config_leaves_out_is_what_transformers_takes():
    from transformers import DeepseekV3Config

    bare = {"architectures": ["DeepseekV3ForCausalLM"], "num_hidden_layers": 4, "vocab_size": 512,
            "hidden_size": 256, "num_attention_heads": 128, "intermediate_size": 64}  # fmt: skip
    written = DeepseekV3Config(**bare).to_dict()
    assert from_huggingface(bare) == from_huggingface(written)
    assert from_huggingface(bare).value("q_lora_rank") == 1536
    assert from_huggingface({**bare, "q_lora_rank": None}).value("q_lora_rank") is None
    # The factor of a rotary scaling is the ratio of the lengths.
    scaling = {"rope_type": "yarn", "original_max_position_embeddings": 512}
    scaled = from_huggingface({**bare, "rope_scaling": scaling})
    assert scaled.value("rotary_scaling_factor") == 4096 / 512


def test_a_sliding_window_that_no_layer_uses_is_no_hindrance():
    used = {**QWEN3, "use_sliding_window": True, "sliding_window": 4096}
    assert from_huggingface({**used, "max_window_layers": 28}) == from_huggingface(QWEN3)
    full = {**used, "layer_types": ["full_attention"] * 28}
    assert from_huggingface(full) == from_huggingface(QWEN3)


def test_json_keeps_everything():
    found = from_huggingface(RELEASED["meta-llama/Llama-3.1-8B-Instruct"])
    assert Architecture.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_a_manifest_of_another_version_is_refused():
    content = from_huggingface(QWEN3).to_json()
    with pytest.raises(UsageError, match="missing: vocab_size; unknown: colour"):
        Architecture.from_json(
            {n: v for n, v in content.items() if n != "vocab_size"} | {"colour": 1}
        )


OF_ANOTHER_TYPE = {"int": 0.5, "float": "1", "bool": 1, "str": 1, "choice": [], "numbers": "0,1"}


@pytest.mark.parametrize("name", sorted(TRANSFORMER_FIELDS | MLA_FIELDS))
def test_a_field_of_another_type_or_of_a_size_that_no_model_has_is_refused(name):
    content = from_huggingface(QWEN3).to_json()
    kind = transformer_fields.load()[name]["type"]
    wrong = [OF_ANOTHER_TYPE[kind], {}, *((-1, 10**400) if kind == "int" else ())]
    for value in wrong:
        changed = {**content, "transformer": {**content["transformer"], name: value}}
        with pytest.raises(UsageError, match=name):
            Architecture.from_json(changed)


@pytest.mark.parametrize(
    "name", [each for each in OWN_FIELDS if each != "huggingface_architecture"]
)
def test_another_value_of_another_type_is_refused(name):
    content = from_huggingface(QWEN3).to_json()
    with pytest.raises(UsageError, match=name):
        Architecture.from_json({**content, name: [{}]})


def test_a_config_json_with_a_size_that_no_model_has_is_refused():
    """A list with an entry for each would take all memory (pruning's choices of a width did)."""
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"):
        found = from_huggingface({**QWEN3, key: 2**62})
        with pytest.raises(UsageError, match="no model has more than"):
            found.check("config.json")


def test_differences_fill_in_megatron_cores_defaults():
    short = Architecture({"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}, 100, 128)
    spelled = Architecture(
        {
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_query_groups": 4,
            "kv_channels": 16,
            "ffn_hidden_size": 256,
            "normalization": "LayerNorm",
            "activation_func": "gelu",
        },
        100,
        128,
    )
    assert short.differences(spelled) == []
    other = Architecture({**spelled.transformer, "num_query_groups": 2}, 101, 128)
    assert short.differences(other) == [("num_query_groups", 4, 2), ("vocab_size", 100, 101)]


def test_the_routers_precision_is_no_contradiction():
    """Megatron-LM's confs ask for float32; the files' model is computed as transformers does."""
    described = from_huggingface(RELEASED["Qwen/Qwen3-30B-A3B"])
    assert described.contradictions({"moe_router_dtype": "fp32"}) == []
    assert described.contradictions({"moe_router_topk": 4})


@pytest.mark.parametrize("conf", ["Qwen/Qwen3-0.6B"])
def test_a_conf_that_contradicts_config_json_names_every_difference(conf):
    args = parse(*conf_flags(conf))
    config = {**QWEN3, "num_hidden_layers": 24, "rope_theta": 10000.0, "tie_word_embeddings": False}
    with pytest.raises(UsageError) as refused:
        model_description.architecture(args, config)
    text = str(refused.value)
    assert "num_layers is 28 in the conf and 24 in config.json" in text
    assert "rotary_base is 1000000.0 in the conf and 10000.0 in config.json" in text
    # Tied embeddings are what a conf says by saying nothing, as in Megatron-LM.
    assert "share_embeddings" not in text


def test_what_an_original_conf_leaves_unsaid_comes_from_config_json():
    args = parse(*"--num-layers 16 --hidden-size 2048 --use-rope-scaling --swiglu".split())
    found = model_description.architecture(args, RELEASED["meta-llama/Llama-3.2-1B-Instruct"])
    assert found.rope_scaling_factor == 32.0
    assert found.transformer["layernorm_epsilon"] == 1e-05


def test_the_length_limit_of_a_conf_may_be_lower_than_the_models():
    args = parse("--max-position-embeddings", "4096")
    assert model_description.architecture(args, QWEN3).max_position_embeddings == 40960


def test_without_config_json_the_missing_flags_are_named():
    with pytest.raises(UsageError, match="--hidden-size, --padded-vocab-size"):
        model_description.architecture(parse("--num-layers", "2", "--num-attention-heads", "4"))


def test_the_vocabulary_is_padded_as_in_megatron_lm(tmp_path):
    shape = "--num-layers 2 --hidden-size 64 --num-attention-heads 4".split()

    def rows(*words: str) -> int:
        return model_description.architecture(parse(*shape, *words)).vocab_size

    assert rows("--padded-vocab-size", "1000") == 1000
    assert rows("--vocab-size", "1000") == 1000
    assert rows("--vocab-size", "1000", "--make-vocab-size-divisible-by", "128") == 1024
    vocabulary = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 999}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(vocabulary))
    assert rows("--tokenizer-model", str(tmp_path)) == 1024
    words = ("--tokenizer-model", str(tmp_path), "--make-vocab-size-divisible-by", "1")
    assert rows(*words) == 1000


def test_group_query_attention_without_a_number_has_one_group():
    assert parse("--group-query-attention").stated["num_query_groups"] == 1


def pruned() -> dict[str, Any]:
    original = from_huggingface(QWEN3)
    small = from_huggingface({**QWEN3, "num_hidden_layers": 24, "intermediate_size": 2048})
    return {"architecture": small.to_json(), "pruned_from": original.to_json()}


def test_a_pruned_checkpoint_needs_no_flags_by_hand():
    args = parse(*conf_flags("Qwen/Qwen3-0.6B"))
    found = model_description.architecture(args, manifest=pruned())
    assert (found.value("num_layers"), found.value("ffn_hidden_size")) == (24, 2048)


def test_flags_that_name_the_pruned_sizes_are_right_too():
    args = parse(*conf_flags("Qwen/Qwen3-0.6B"), "--num-layers", "24", "--ffn-hidden-size", "2048")
    assert model_description.architecture(args, manifest=pruned()).value("num_layers") == 24


def test_a_conf_of_another_model_is_refused_with_both_values():
    args = parse(*conf_flags("Qwen/Qwen3-8B"), "--load", "/work/x")
    with pytest.raises(UsageError) as refused:
        model_description.architecture(args, manifest=pruned())
    text = str(refused.value)
    assert "--load /work/x" in text
    assert "num_layers is 36 in the conf and 24 in the checkpoint" in text
    assert "hidden_size is 4096 in the conf and 1024 in the checkpoint" in text
    args = parse(*conf_flags("Qwen/Qwen3-0.6B"))
    unpruned = {"architecture": pruned()["architecture"]}
    with pytest.raises(UsageError, match="num_layers is 28 in the conf and 24"):
        model_description.architecture(args, manifest=unpruned)


@pytest.mark.parametrize(
    "architecture", ["DeepseekV4ForCausalLM", "Llama5ForCausalLM", "Qwen3MambaForCausalLM"]
)
def test_another_models_name_is_not_taken_for_a_misspelling(architecture):
    with pytest.raises(UsageError) as refused:
        from_huggingface({**QWEN3, "architectures": [architecture]})
    assert architecture in str(refused.value)
    assert "Did you mean" not in str(refused.value)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("Gemma3ForConditionalGeneration", "in both directions"),
        ("Gemma2ForCausalLM", "capped"),
        ("GraniteMoeHybridForCausalLM", "constant factors"),
        ("DeepseekV32ForCausalLM", "indexer"),
    ],
)
def test_an_architecture_that_megatron_core_lacks_is_refused_with_the_reason(architecture, reason):
    with pytest.raises(UsageError) as refused:
        from_huggingface({**QWEN3, "architectures": [architecture]})
    assert architecture in str(refused.value) and reason in str(refused.value)


@pytest.mark.parametrize(
    ("stated", "refused"), [({"sliding_window": 4096}, True), ({}, True),
                            ({"sliding_window": None}, False), ({"sliding_window": 32768}, False)],
)  # fmt: skip
def test_mistrals_window_is_refused_where_a_text_can_be_longer(stated, refused):
    config = {
        **{key: QWEN3[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")},
        **{"architectures": ["MistralForCausalLM"], "vocab_size": 512, **stated},
        **{"intermediate_size": 64, "max_position_embeddings": 32768},
    }
    if not refused:
        assert from_huggingface(config).value("window_size") is None
        return
    with pytest.raises(UsageError, match="sliding window of 4096 tokens"):
        from_huggingface(config)


_EIGHT_GROUPS = {"num_attention_heads": 32, "num_key_value_heads": 8}
_MISTRAL_7B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
# Architecture, what decides the tensors of a released model without a conf, its parameters.
WITHOUT_CONF = {
    "Mistral-7B-v0.3": (
        "MistralForCausalLM",
        {**_EIGHT_GROUPS, **_MISTRAL_7B, "vocab_size": 32768, "sliding_window": None},
        7_248_023_552,
    ),
    "Mistral-Nemo-2407": (
        "MistralForCausalLM",
        {**_EIGHT_GROUPS, "hidden_size": 5120, "intermediate_size": 14336, "head_dim": 128,
         "num_hidden_layers": 40, "vocab_size": 131072, "sliding_window": None},
        12_247_782_400,
    ),
    "Mixtral-8x7B-v0.1": (
        "MixtralForCausalLM",
        {**_EIGHT_GROUPS, **_MISTRAL_7B, "vocab_size": 32000, "num_local_experts": 8},
        46_702_792_704,
    ),
    "Phi-4": (
        "Phi3ForCausalLM",
        {"hidden_size": 5120, "intermediate_size": 17920, "num_hidden_layers": 40,
         "num_attention_heads": 40, "num_key_value_heads": 10, "vocab_size": 100352},
        14_659_507_200,
    ),
    "SmolLM3-3B": (
        "SmolLM3ForCausalLM",
        {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
         "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 128256},
        3_075_098_624,
    ),
    "Seed-OSS-36B": (
        "SeedOssForCausalLM",
        {"hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 64, "head_dim": 128,
         "num_attention_heads": 80, "num_key_value_heads": 8, "vocab_size": 155136},
        36_151_104_512,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WITHOUT_CONF)
def test_a_released_model_without_a_conf_has_its_published_size(name):
    architecture, config, published = WITHOUT_CONF[name]
    found = from_huggingface({"architectures": [architecture], **config})
    assert parameter_count.total(found) == published
