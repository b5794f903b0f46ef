"""Copies between devices, piece by piece."""

import pytest
import torch

from post_training.export import staging

TENSORS = {
    "matrix": torch.randn(7, 5),
    "scalar": torch.tensor(2.0),
    "not contiguous": torch.randn(4, 6).t(),
    "empty": torch.zeros(0, 3),
    "codes": torch.arange(40, dtype=torch.uint8).view(torch.float8_e4m3fn),
    "parameter": torch.nn.Parameter(torch.ones(2)),
}


@pytest.mark.parametrize("name", TENSORS)
def test_copies_have_the_same_bits_and_memory_of_their_own(name, monkeypatch):
    monkeypatch.setattr(staging, "_BYTES", 16)
    monkeypatch.setattr(staging, "_buffer", lambda: torch.empty(16, dtype=torch.uint8))
    source = TENSORS[name]
    pieces = torch.empty(source.shape, dtype=source.dtype)
    staging._copy(source.detach().contiguous(), pieces)
    for copy in (staging.to_host(source), pieces):
        assert copy.is_contiguous()
        assert not copy.requires_grad
        assert copy.data_ptr() != source.data_ptr() or not copy.numel()
        assert torch.equal(copy.float(), source.float())
