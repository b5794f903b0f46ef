"""Every registered family, by its tiny configuration: read, written back, refused, counted.

A new family is tested here, in ``tests/parallel/test_logits.py`` and in
``tests/stages/test_convert_export.py`` by being registered.
"""

from __future__ import annotations

import json

import pytest

from post_training.common.errors import UsageError
from post_training.models import parameter_count
from post_training.models.architecture import Architecture
from post_training.models.families import registry as families

FAMILIES = {family.name: family for family in families.FAMILIES.values()}


def written(family, folder, **changes):
    """The tiny model's ``config.json`` as transformers writes it."""
    from transformers import AutoConfig

    config = AutoConfig.for_model(**family.tiny_config(**changes))
    config.save_pretrained(folder)
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


def test_names_are_unique():
    assert len(FAMILIES) == len(families.FAMILIES)


def test_what_transformers_writes_is_read(family, tmp_path):
    config = written(family, tmp_path)
    found = families.from_huggingface(config)
    assert found.huggingface_architecture == family.architecture
    assert found.value("num_layers") == config["num_hidden_layers"]
    assert Architecture.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_the_older_form_of_rotary_positions_is_read_like_transformers_own(family, tmp_path):
    config = written(family, tmp_path)
    rope = config.pop("rope_parameters")
    older = {**config, "rope_theta": rope["rope_theta"], "rope_scaling": rope}
    assert families.from_huggingface(older) == family.read({**config, "rope_parameters": rope})
    older["rope_scaling"] = {**rope, "type": rope["rope_type"]}
    del older["rope_scaling"]["rope_type"]
    assert families.from_huggingface(older) == family.read({**config, "rope_parameters": rope})


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
        with pytest.raises(UsageError) as refused:
            families.from_huggingface(family.tiny_config(**{key: other}))
        assert f"{key} = {other!r}" in str(refused.value)
        assert meaning in str(refused.value)


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
