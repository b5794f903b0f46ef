"""Nemotron: sizes, the rotated part of each head, and what cannot be done with its norms."""

from __future__ import annotations

import re

import pytest
from confs import conf_architecture
from released_configs import RELEASED

from post_training.models import parameter_count
from post_training.models.families.registry import from_huggingface

MINI = "nvidia/Nemotron-Mini-4B-Instruct"
OF_NVIDIA = [conf for conf in RELEASED if conf.startswith("nvidia/")]


@pytest.mark.parametrize("conf", OF_NVIDIA)
def test_the_conf_has_as_many_parameters_as_transformers_own_model(conf):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**RELEASED[conf]))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count.total(conf_architecture(conf)) == count
    # Billions in the name, which rounds generously: of 4B there are 4.49.
    (named, *_) = re.findall(r"-(\d+)B", conf)
    assert count == pytest.approx(int(named) * 1e9, rel=0.13)


def test_nemotron_3_nano_has_the_published_31_6_billion_parameters():
    total = parameter_count.total(conf_architecture("nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"))
    assert round(total / 1e9, 1) == 31.6


def test_half_of_each_head_is_rotated_where_the_file_does_not_say():
    config = {k: v for k, v in RELEASED[MINI].items() if k != "partial_rotary_factor"}
    assert from_huggingface(config).rotary_percent == 0.5
    assert from_huggingface({**config, "partial_rotary_factor": 0.25}).rotary_percent == 0.25


def test_the_biases_of_its_norms_are_not_read_where_norms_are_fused():
    assert conf_architecture(MINI).unfusable_norms == "the biases of its LayerNorms"
    assert conf_architecture("Qwen/Qwen3-0.6B").unfusable_norms == ""
