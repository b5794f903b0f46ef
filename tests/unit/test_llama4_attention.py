"""Llama 4's chunks and temperature, beside attention with every score written out."""

from __future__ import annotations

import pytest
import tools  # noqa: F401  (installs the stand-ins)
import torch
from confs import conf_architecture
from released_configs import RELEASED
from torch import nn

from post_training.models import llama4_attention, parameter_count

SIZE, FLOOR, SCALE = 5, 3, 0.4
HEADS, WIDTH, BATCH = 2, 8, 3


class Core(nn.Module):
    """Attention of megatron-core's form: [s, b, h, d] to [s, b, h * d]; True hides."""

    def forward(self, query, key, value, mask, causal=True):
        scores = torch.einsum("qbhd,kbhd->bhqk", query, key) * WIDTH**-0.5
        if mask is None and causal:
            mask = torch.ones(len(query), len(key)).triu(1).bool()
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return torch.einsum("bhqk,kbhd->qbhd", scores.softmax(-1), value).flatten(2)


def core(*, chunks, temperature):
    """Hooked as :func:`llama4_attention.attach` hooks one."""
    found = Core()
    if temperature:
        found.register_forward_pre_hook(llama4_attention.tempering(FLOOR, SCALE))
    if chunks:
        llama4_attention.chunk(found, SIZE)
    return found


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(13, BATCH, HEADS, WIDTH, generator=generator) for _ in range(3)]


def wanted(query, key, value, *, chunks, temperature):
    positions = torch.arange(len(query))
    if temperature:
        factors = 1 + SCALE * torch.log(1 + (positions + 1).div(FLOOR, rounding_mode="floor"))
        query = query * factors[:, None, None, None]
    hidden = positions[:, None] < positions
    if chunks:
        hidden = hidden | (positions[:, None] // SIZE != positions // SIZE)
    return Core()(query, key, value, hidden)


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize("temperature", [True, False])
@pytest.mark.parametrize("length", [4, 5, 6, 10, 13])
def test_a_text_without_a_cache(text, length, chunks, temperature):
    text = [each[:length] for each in text]
    actual = core(chunks=chunks, temperature=temperature)(*text, None)
    expected = wanted(*text, chunks=chunks, temperature=temperature)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("chunks", [True, False])
@pytest.mark.parametrize("temperature", [True, False])
def test_queries_after_a_cache(text, chunks, temperature):
    expected = wanted(*text, chunks=chunks, temperature=temperature)
    attend = core(chunks=chunks, temperature=temperature)
    query, *memory = text
    for end in range(1, 14):
        one = attend(query[end - 1 : end], *(each[:end] for each in memory), None, causal=False)
        torch.testing.assert_close(one, expected[end - 1 : end])
    for start in (3, 7, 11):
        hidden = torch.arange(start, 13)[:, None] < torch.arange(13)
        several = attend(query[start:], *memory, hidden[None, None])
        torch.testing.assert_close(several, expected[start:])


@pytest.mark.parametrize("model", [name for name in RELEASED if "Llama-4" in name])
def test_a_conf_has_as_many_parameters_as_transformers_own_text_model(model):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**RELEASED[model]["text_config"])
    with torch.device("meta"):
        text_model = AutoModelForCausalLM.from_config(config)
    count = sum(parameter.numel() for parameter in text_model.parameters())
    assert parameter_count.total(conf_architecture(model)) == count
