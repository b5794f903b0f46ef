"""On a GPU with ``fla`` or ``mamba_ssm``: their kernels compute what the stand-ins compute.

The kernels multiply with 8 bits of mantissa, so differences are held to 5 % in the Euclidean norm.
"""

from __future__ import annotations

import json

import pytest
import tools
import torch

from post_training.portable import delta_rule, mamba

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TRAINING = (
    *("--seq-length", 128, "--train-iters", 3, "--micro-batch-size", 2, "--log-interval", 1),
    *("--eval-iters", 0, "--lr", 1e-3),
)


def far(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((actual.float() - wanted.float()).norm() / wanted.float().norm()).item()


def compare(kernels, stand_in, tensors: dict[str, torch.Tensor], **options) -> None:
    """Outputs, last states and gradients."""
    outcomes = []
    for rule in (kernels, stand_in):
        leaves = {name: each.clone().requires_grad_() for name, each in tensors.items()}
        output, state = rule(**leaves, **options)
        torch.manual_seed(1)
        output.float().mul(torch.randn(output.shape, device="cuda")).sum().backward()
        outcomes.append((output, state, {name: leaf.grad for name, leaf in leaves.items()}))
    (output, state, mine), (wanted, last, theirs) = outcomes
    found = {"output": far(output, wanted), "state": far(state, last)}
    found |= {f"gradient of {name}": far(mine[name], each) for name, each in theirs.items()}
    print(found)
    assert max(found.values()) < 0.05, found


@pytest.mark.skipif(bool(delta_rule.why_not()), reason=delta_rule.why_not())
@pytest.mark.parametrize("key, value, tokens", [(16, 32, 150), (128, 128, 200)])
def test_the_delta_rule(key, value, tokens):
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    torch.manual_seed(0)
    heads, half = (2, tokens, 4), {"device": "cuda", "dtype": torch.bfloat16}
    tensors = {
        "q": torch.randn(*heads, key, **half),
        "k": torch.randn(*heads, key, **half),
        "v": torch.randn(*heads, value, **half),
        "g": -torch.rand(heads, device="cuda"),
        "beta": torch.rand(heads, **half),
        "initial_state": torch.randn(2, 4, key, value, device="cuda"),
    }
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    compare(chunk_gated_delta_rule, delta_rule.chunk_gated_delta_rule, tensors, **options)


@pytest.mark.skipif(bool(mamba.why_not()), reason=mamba.why_not())
def test_the_mamba_scan():
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    stand_in = mamba.stand_in_scans().mamba_chunk_scan_combined
    torch.manual_seed(0)
    half = {"device": "cuda", "dtype": torch.bfloat16}
    tensors = {
        "x": torch.randn(2, 300, 8, 64, **half),
        "dt": torch.randn(2, 300, 8, **half),
        "A": -torch.rand(8, device="cuda") * 4,
        "B": torch.randn(2, 300, 2, 64, **half),
        "C": torch.randn(2, 300, 2, 64, **half),
        "D": torch.randn(8, device="cuda"),
        "dt_bias": torch.randn(8, device="cuda"),
    }
    options = {"chunk_size": 128, "dt_softplus": True, "return_final_states": True}
    compare(mamba_chunk_scan_combined, stand_in, tensors, **options)


@pytest.mark.parametrize("family", ["qwen3-next", "qwen3.5", "nemotron-h"])
def test_a_model_is_trained_in_bfloat16(tmp_path, family):
    """On the kernels where they are, with finite losses that fall."""
    tools.random_model(tmp_path / "hf", family, torch.bfloat16, max_position_embeddings=512)
    chat = tools.write_conversations(tmp_path / "chat.jsonl")
    flags = ("--pretrained-model-path", tmp_path / "hf", "--save", tmp_path / "tuned")
    tools.run_stages(("finetune", (*flags, "--finetune-data-files", chat, *TRAINING)))
    rows = (tmp_path / "tuned" / "training" / "metrics.jsonl").read_text().splitlines()
    losses = [each["loss"] for each in map(json.loads, rows) if "loss" in each]
    assert len(losses) >= 2
    assert losses[-1] < losses[0]
