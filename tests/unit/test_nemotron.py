"""Nemotron: its size, its rotated part of each head, and what cannot be done with its norms."""

from __future__ import annotations

from confs import conf_architecture
from released_configs import RELEASED

from post_training.models import parameter_count
from post_training.models.families.registry import from_huggingface

MINI = "nvidia/Nemotron-Mini-4B-Instruct"


def test_the_conf_has_as_many_parameters_as_transformers_own_model():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**RELEASED[MINI]))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count.total(conf_architecture(MINI)) == count


def test_half_of_each_head_is_rotated_where_the_file_does_not_say():
    config = {k: v for k, v in RELEASED[MINI].items() if k != "partial_rotary_factor"}
    assert from_huggingface(config).rotary_percent == 0.5
    assert from_huggingface({**config, "partial_rotary_factor": 0.25}).rotary_percent == 0.25


def test_the_biases_of_its_norms_are_not_read_where_norms_are_fused():
    assert conf_architecture(MINI).unfusable_norms == "the biases of its LayerNorms"
    assert conf_architecture("Qwen/Qwen3-0.6B").unfusable_norms == ""
