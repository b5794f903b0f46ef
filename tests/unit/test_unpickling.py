"""Unpickling constructs what checkpoints hold and runs nothing else."""

from __future__ import annotations

import argparse
import io
import pickle
from collections import OrderedDict

import pytest
import torch

from post_training.checkpoints.unpickling import only_known_classes
from post_training.common.errors import UsageError


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def torch_saved(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


READERS = {
    "loads": (pickle.dumps, lambda data: pickle.loads(data)),
    "load": (pickle.dumps, lambda data: pickle.load(io.BytesIO(data))),
    "torch.load": (torch_saved, lambda data: torch.load(io.BytesIO(data), weights_only=False)),
}


@pytest.mark.parametrize("way", READERS)
def test_a_payload_is_refused_by_name_and_does_not_run(tmp_path, way):
    write, read = READERS[way]
    data = write({"args": Payload(tmp_path / "ran")})
    with pytest.raises(UsageError, match="io"), only_known_classes("checkpoint x"):
        read(data)
    assert not (tmp_path / "ran").exists()
    read(data)  # the restriction ends with the block
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("way", READERS)
def test_what_checkpoints_hold_is_read(way):
    write, read = READERS[way]
    content = {
        "args": argparse.Namespace(size=torch.Size([2, 3]), dtype=torch.bfloat16),
        "state": OrderedDict(weight=torch.arange(4.0), bits=torch.ones(2, dtype=torch.uint8)),
    }
    with only_known_classes("checkpoint x"):
        found = read(write(content))
    assert found["args"] == content["args"]
    assert torch.equal(found["state"]["weight"], content["state"]["weight"])


def test_other_errors_pass_as_they_are():
    with pytest.raises(ZeroDivisionError), only_known_classes("checkpoint x"):
        raise ZeroDivisionError


def test_what_was_pickled_beside_megatron_core_is_read():
    """Its import puts a function of its own in the place of the one that loads storages."""
    import megatron.core  # noqa: F401

    data = pickle.dumps(torch.arange(4.0))
    assert b"safe_load_from_bytes" in data
    with only_known_classes("checkpoint x"):
        assert pickle.loads(data).tolist() == [0, 1, 2, 3]
