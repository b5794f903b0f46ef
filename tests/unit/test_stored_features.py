"""Shards of stored features: what is not what a target gives is refused by its shard's name."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from post_training.common import hashing
from post_training.common.errors import UsageError
from post_training.drafts.shards import Features, Form

ROWS, LENGTH, SIZE, VOCABULARY = 2, 4, 8, 100


def sound():
    return {
        "input_ids": torch.arange(ROWS * LENGTH, dtype=torch.int32).reshape(ROWS, LENGTH),
        "loss_mask": torch.ones(ROWS, LENGTH, dtype=torch.uint8),
        "hidden_states": torch.zeros(ROWS, LENGTH, SIZE),
        "aux_hidden_states": torch.zeros(ROWS, LENGTH, 3 * SIZE),
    }


def put(name, value):
    def change(tensors):
        tensors[name][1, 2] = value

    return change


def replace(name, tensor):
    def change(tensors):
        tensors[name] = tensor

    return change


DAMAGES = {
    "a token beyond": (put("input_ids", VOCABULARY), "has tokens that the target"),
    "a negative token": (put("input_ids", -1), "has tokens that the target"),
    "a mask of 2": (put("loss_mask", 2), "masks are not 0 and 1"),
    "fewer rows": (replace("input_ids", torch.zeros(1, LENGTH).int()), "input_ids has shape"),
    "other states": (replace("hidden_states", torch.zeros(ROWS, LENGTH, 1)), "has shape"),
    "a list": (replace("aux_hidden_states", torch.zeros(3)), "aux_hidden_states has shape"),
    "no masks": (lambda tensors: tensors.pop("loss_mask"), "not these tensors alone"),
    "one more": (replace("more", torch.zeros(1)), "not these tensors alone"),
}


@pytest.mark.parametrize("what", [None, *DAMAGES, "cut short"])
def test_a_shard_of_another_form_is_refused(what, tmp_path):
    path, tensors = tmp_path / "shard-00000.safetensors", sound()
    change, cause = DAMAGES.get(what, (lambda _: None, "cannot be read"))
    change(tensors)
    save_file(tensors, path)
    if what == "cut short":
        path.write_bytes(path.read_bytes()[:-8])
    form = Form(LENGTH, SIZE, 3 * SIZE, VOCABULARY)
    features = Features([(path, ROWS)], {path: hashing.describe(path)}, form)
    for read in (lambda: features.batch([1, 0]), features.tokens):
        if what is None:
            read()
        else:
            with pytest.raises(UsageError, match=cause) as refused:
                read()
            assert str(path) in refused.value.what


def test_a_shard_is_read_as_it_was_recorded(tmp_path):
    path = tmp_path / "shard-00000.safetensors"
    save_file(sound(), path)
    features = Features(
        [(path, ROWS)], {path: hashing.describe(path)}, Form(LENGTH, SIZE, 3 * SIZE, VOCABULARY)
    )
    tensors = sound()
    tensors["hidden_states"][0, 0, 0] = 1
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"not what run\.json recorded"):
        features.batch([0])
