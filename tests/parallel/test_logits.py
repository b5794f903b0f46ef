"""The Megatron model computes what transformers computes, at every layout, and decodes the same.

Tolerance in float32: 1e-4 at TP=1, where only the order of additions differs (fused QKV and
gate/up products, SDPA against eager attention), 1e-3 where a product is also split over ranks.
Logits are of the order of 1 to 10, so this is five to six decimal digits.
"""

from __future__ import annotations

import pytest
import tools

NEW_TOKENS = 8
PLAIN = ("TP=1", "TP=2", "PP=2")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> folder and transformers model."""
    root = tmp_path_factory.mktemp("models")
    names = [*tools.FAMILIES, *tools.ROTARY]
    return {name: (root / name, tools.random_model(root / name, name)) for name in names}


@pytest.mark.parametrize("layout", list(tools.LAYOUTS))
def test_logits_equal_transformers_in_float32(models, layout, tmp_path):
    processes, flags = tools.LAYOUTS[layout]
    ids = tools.tokens()
    names = tools.families_at(layout) + list(tools.ROTARY if layout in PLAIN else ())
    divided = {name: models[name] for name in names}
    tools.run_stages(
        *(
            tools.logits_job(
                *(tmp_path / name, ids, "--pretrained-model-path", folder, "--fp32"),
                *("--new-tokens", NEW_TOKENS, *flags),
            )
            for name, (folder, _) in divided.items()
        ),
        processes=processes,
    )
    for name, (_, reference) in divided.items():
        wanted = tools.transformers_logits(reference, ids)
        difference = (tools.read_logits(tmp_path / name) - wanted).abs().max().item()
        assert wanted.std() > 0.5, "logits that hardly vary would agree by chance"
        greedy = tools.transformers_tokens(reference, ids, NEW_TOKENS)
        assert tools.read_tokens(tmp_path / name) == greedy, (name, layout)
        assert difference < (1e-4 if processes == 1 else 1e-3), (name, layout, difference)
