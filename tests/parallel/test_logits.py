"""The Megatron model computes what transformers computes, at every layout, and decodes the same.

Tolerance in float32: 1e-4 at TP=1, where only the order of additions differs (fused QKV and
gate/up products, SDPA against eager attention), 1e-3 where a product is also split over ranks.
Logits are of the order of 1 to 10, so this is five to six decimal digits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import rounding
import tools
import torch

NEW_TOKENS = 8
PLAIN = ("TP=1", "TP=2", "PP=2")


@dataclass(frozen=True)
class Reference:
    """A model's folder, and what transformers computes with it."""

    folder: Path
    logits: torch.Tensor
    tokens: list[list[int]]


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, Reference]:
    """By family, computed once for all layouts."""
    root, ids = tmp_path_factory.mktemp("models"), tools.tokens()
    found = {}
    for name in (*tools.FAMILIES, *tools.ROTARY):
        model = tools.random_model(root / name, name)
        logits = tools.transformers_logits(model, ids)
        assert logits.std() > 0.5, "logits that hardly vary would agree by chance"
        tokens = tools.transformers_tokens(model, ids, NEW_TOKENS)
        found[name] = Reference(root / name, logits, tokens)
    return found


@pytest.mark.parametrize("layout", list(tools.LAYOUTS))
def test_logits_equal_transformers_in_float32(references, layout, tmp_path):
    processes, flags = tools.LAYOUTS[layout]
    ids = tools.tokens()
    names = tools.families_at(layout) + list(tools.ROTARY if layout in PLAIN else ())
    tools.run_stages(
        *(
            tools.logits_job(
                *(tmp_path / name, ids, "--pretrained-model-path", references[name].folder),
                *("--fp32", "--new-tokens", NEW_TOKENS, *flags),
            )
            for name in names
        ),
        processes=processes,
    )
    for name in names:
        wanted = references[name]
        difference = (tools.read_logits(tmp_path / name) - wanted.logits).abs().max().item()
        assert tools.read_tokens(tmp_path / name) == wanted.tokens, (name, layout)
        assert difference < (1e-4 if processes == 1 else 1e-3), (name, layout, difference)


# Each has other places of rounding: norms that store their weight less one, a norm after a
# recurrence, norms of what attention gives, multipliers, experts, latents.
@pytest.mark.parametrize(
    "names", [("gemma3", "nemotron", "nemotron-h", "qwen3.5", "olmo3", "granite", "deepseek-v3")]
)
def test_bfloat16_is_as_near_to_float32_as_transformers(names, tmp_path):
    found, _ = rounding.measure(tmp_path, names)
    assert not {name: each for name, each in found.items() if not each.is_alike(1.3)}
