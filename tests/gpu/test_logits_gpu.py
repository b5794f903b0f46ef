"""On a GPU: Megatron computes what transformers computes, in bfloat16 and float32, every family.

Gated delta nets and Mamba layers run on the kernels of ``fla`` and ``mamba_ssm`` where those are
installed; transformers computes in PyTorch all the same.
"""

from __future__ import annotations

import pytest
import rounding
import tools
import torch

from post_training.portable import delta_rule, mamba

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.timeout(900),
]


def test_bfloat16_is_as_near_to_float32_as_transformers(tmp_path):
    found, printed = rounding.measure(tmp_path, [*tools.FAMILIES, *tools.ROTARY], "cuda")
    for name, each in found.items():
        print(f"{name}: {each}")
    wrong = {name: each for name, each in found.items() if not each.is_alike(1.5)}
    assert not wrong
    assert ("fla's kernels" in printed) == (not delta_rule.why_not()), printed
    assert ("mamba_ssm's kernels" in printed) == (not mamba.why_not()), printed


@pytest.mark.parametrize(
    "parts, why_not", [("gated delta nets", delta_rule.why_not), ("Mamba layers", mamba.why_not)]
)
def test_float32_is_not_rounded_by_kernels(tmp_path, parts, why_not):
    """Where they are not installed, it is the same PyTorch as on a CPU."""
    names = [name for name, family in tools.FAMILIES.items() if parts in family.parts]
    assert names
    references = {name: tools.random_model(tmp_path / name, name) for name in names}
    ids = tools.tokens()
    jobs = {
        name: tools.logits_job(
            *(tmp_path / f"{name}_logits", ids, "--pretrained-model-path", tmp_path / name),
            *("--fp32", "--new-tokens", rounding.NEW_TOKENS),
        )
        for name in names
    }
    tools.run_stages(*jobs.values())
    for name, reference in references.items():
        exact = tools.transformers_logits(reference, ids)
        difference = (tools.read_logits(tmp_path / f"{name}_logits") - exact).abs().max().item()
        print(f"{name}, {why_not() or 'kernels are here'}: {difference:.2e}")
        assert difference < 1e-3, (name, difference)
        wanted = tools.transformers_tokens(reference, ids, rounding.NEW_TOKENS)
        assert tools.read_tokens(tmp_path / f"{name}_logits") == wanted, name
