"""On a GPU: passes are sized by the memory that is free, and halved where it runs out for real."""

import json

import pytest
import tools
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SEQUENCES, LENGTH = 256, 256


def test_a_gpu_that_is_too_small_for_a_pass_halves_it_and_loses_nothing(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    tools.random_model(
        tmp_path / "model", "qwen3", torch.bfloat16, max_position_embeddings=1024, **sizes
    )
    lines = [json.dumps({"text": f"Fact {i}: {i} plus {i} is {2 * i}."}) for i in range(4000)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    tools.run(
        "tests/helpers/memory_worker.py",
        tmp_path / "results.pt",
        *("--pretrained-model-path", tmp_path / "model", "--bf16"),
        *("--calib-dataset-path-or-name", tmp_path / "text.jsonl"),
        *("--calib-size", SEQUENCES, "--calib-max-sequence-length", LENGTH),
    )
    found = torch.load(tmp_path / "results.pt", weights_only=True)
    one, auto, limited = (found[name] for name in ("one", "auto", "limited"))
    assert auto["halved"] == 0
    assert auto["largest"] * LENGTH > 8192
    assert limited["halved"] >= 1
    assert 1 < limited["largest"] < auto["largest"]
    for each in (auto, limited):
        # And one sequence to see which quantizers are used.
        assert each["tokens"] == one["tokens"] == (SEQUENCES + 1) * LENGTH
        for name, scale in one["scales"].items():
            # A product may be rounded differently with another number of rows.
            assert torch.allclose(each["scales"][name], scale, rtol=0.02), name
