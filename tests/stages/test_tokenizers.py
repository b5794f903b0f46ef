"""Tokenizers that cannot be read, or that make tokens the model has no embedding for."""

from __future__ import annotations

import json

import pytest
import tools
import torch

TOKEN = "<|new|>"


@pytest.fixture
def model(tmp_path):
    size = len(tools.byte_tokenizer())
    tools.random_model(tmp_path / "model", "llama3", torch.bfloat16, vocab_size=size)
    tools.write_conversations(tmp_path / "chat.jsonl", 4)
    return tmp_path / "model"


def generate(model, code):
    flags = ("--pretrained-model-path", model, "--prompts-path", model.parent / "chat.jsonl")
    output = ("--output", model.parent / "answers.jsonl", "--max-new-tokens", 2)
    return tools.run("generate.py", *flags, *output, code=code).stderr


def change_tokenizer(model, change):
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def add_token(content):
    """One more than the model has embeddings."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": len(tools.byte_tokenizer()), "content": TOKEN, "special": True, **plain}
    content["added_tokens"].append(token)


def test_a_tokenizer_of_a_newer_version_is_named(model):
    change_tokenizer(model, lambda content: content.update(pre_tokenizer={"type": "Future"}))
    told = generate(model, 2)
    assert str(model) in told and "cannot load it" in told and "Traceback" not in told


def test_a_template_that_writes_a_token_without_embedding_is_refused(model):
    change_tokenizer(model, add_token)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + TOKEN)
    told = generate(model, 2)
    size = len(tools.byte_tokenizer())
    assert f"it has ids up to {size} ({TOKEN}), the model has {size} embeddings" in told


def test_a_token_that_no_template_writes_may_have_no_embedding(model):
    change_tokenizer(model, add_token)
    template = model / "chat_template.jinja"
    template.write_text("{{ strftime_now('%Y') }}" + template.read_text())
    told = generate(model, 0)
    assert f"texts must not contain {TOKEN}" in told
    assert f"the chat template of {model} writes the date" in told
