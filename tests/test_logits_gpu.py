"""On a GPU: Megatron in bfloat16 computes what transformers computes in bfloat16.

Both round every activation to 8 bits of mantissa (2**-9 relative each), after other orders of
additions. Over six layers this adds up; the difference is held to 1 % in the Euclidean norm.
"""

from __future__ import annotations

import pytest
import tools
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_logits_equal_transformers_in_bfloat16(tmp_path):
    ids = tools.tokens()
    jobs, references = [], {}
    for family in tools.FAMILIES:
        folder = tmp_path / family
        references[family] = tools.random_model(folder, family, torch.bfloat16)
        jobs.append(
            tools.logits_job(tmp_path / f"{family}_logits", ids, "--pretrained-model-path", folder)
        )
    tools.run_stages(*jobs)
    for family, reference in references.items():
        wanted = tools.transformers_logits(reference.cuda(), ids.cuda()).cpu()
        difference = tools.read_logits(tmp_path / f"{family}_logits") - wanted
        assert difference.norm() < 0.01 * wanted.norm(), (family, difference.norm() / wanted.norm())
