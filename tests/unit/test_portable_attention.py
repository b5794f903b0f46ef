"""The stand-in's attention against softmax written out, and what it must not allocate."""

from __future__ import annotations

from typing import Any

import portable_helpers as helpers
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import transformer_engine.pytorch as te

pytestmark = pytest.mark.skipif(
    helpers.REPORT.real_transformer_engine, reason="the real Transformer Engine runs here"
)
CAUSAL = "causal"
HEADS, GROUPS, SIZE = 4, 2, 16


def attention(**options: Any) -> te.DotProductAttention:
    return te.DotProductAttention(HEADS, SIZE, num_gqa_groups=GROUPS, **options).to(helpers.DEVICE)


def inputs(queries: int = 6, keys: int = 6, batch: int = 2) -> list[torch.Tensor]:
    """Queries, keys and values, [s, b, h, d] each."""
    shapes = [(queries, batch, HEADS, SIZE), *[(keys, batch, GROUPS, SIZE)] * 2]
    return [helpers.random(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]


def expected(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor | None,
    offset: torch.Tensor | None = None,
) -> torch.Tensor:
    """Softmax attention, [sq, b, h * d]; ``hidden`` is True where a key is not seen."""
    key, value = (each.repeat_interleave(HEADS // GROUPS, dim=2) for each in (key, value))
    scores = torch.einsum("qbhd,kbhd->bhqk", query, key) / SIZE**0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if offset is not None:
        column = offset.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1).nan_to_num(0.0)[..., : key.shape[0]]
    return torch.einsum("bhqk,kbhd->qbhd", weights, value).flatten(-2)


def band(queries: int, keys: int, before: int | None, after: int | None, offset: int = 0):
    """True where key j is outside i + offset - before .. i + offset + after."""
    i = torch.arange(queries, device=helpers.DEVICE)[:, None] + offset
    j = torch.arange(keys, device=helpers.DEVICE)[None, :]
    hidden = torch.zeros(queries, keys, dtype=torch.bool, device=helpers.DEVICE)
    if before is not None:
        hidden |= j < i - before
    if after is not None:
        hidden |= j > i + after
    return hidden


def check(mine: torch.Tensor, reference: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """Same values, and the same gradients of the leaves."""
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(mine, reference, **tolerance)
    upstream = helpers.random(*mine.shape, seed=9)
    for a, b in zip(
        torch.autograd.grad(mine, leaves, upstream),
        torch.autograd.grad(reference, leaves, upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize(
    ("mask_type", "window", "queries", "keys", "hidden"),
    [
        ("no_mask", None, 6, 6, (None, None, 0)),
        ("no_mask", None, 1, 6, (None, None, 0)),
        ("causal", None, 6, 6, (None, 0, 0)),
        ("causal", None, 3, 6, (None, 0, 0)),
        ("causal_bottom_right", None, 6, 6, (None, 0, 0)),
        ("causal_bottom_right", None, 3, 6, (None, 0, 3)),
        ("causal_bottom_right", None, 1, 6, (None, 0, 5)),
        ("causal", (2, 0), 6, 6, (2, 0, 0)),
        ("causal_bottom_right", (2, 0), 3, 6, (2, 0, 3)),
        ("causal_bottom_right", (2, 0), 1, 6, (2, 0, 5)),
        ("no_mask", (1, 2), 6, 6, (1, 2, 0)),
        ("no_mask", (2, 0), 1, 6, (2, 0, 5)),
    ],
)
def test_masks_that_follow_from_indices(mask_type, window, queries, keys, hidden):
    layers = inputs(queries, keys)
    mine = attention(window_size=window)(*layers, attn_mask_type=mask_type)
    before, after, offset = hidden
    check(mine, expected(*layers, band(queries, keys, before, after, offset)), layers)


@pytest.mark.parametrize("chunk", [4, 1024])
def test_arbitrary_masks_hide_where_true_and_rows_without_a_key_give_zero(chunk, monkeypatch):
    from transformer_engine.pytorch.attention import dot_product_attention

    monkeypatch.setattr(dot_product_attention, "QUERY_CHUNK", chunk)
    layers = inputs()
    mask = helpers.random(2, 1, 6, 6, seed=4) > 0
    mask[1, :, 2] = True
    mine = attention()(*layers, mask, attn_mask_type="arbitrary")
    assert mine[2, 1].count_nonzero() == 0
    weights = torch.autograd.grad(mine.sum(), layers, retain_graph=True)
    assert all(each.isfinite().all() for each in weights)
    torch.testing.assert_close(mine, expected(*layers, mask), rtol=1e-4, atol=1e-5)


def test_a_mask_type_that_needs_a_mask_says_so():
    with pytest.raises(ValueError, match="'arbitrary' needs attention_mask"):
        attention()(*inputs(), attn_mask_type="arbitrary")
    with pytest.raises(ValueError, match="'diagonal'"):
        attention()(*inputs(), attn_mask_type="diagonal")


@pytest.mark.parametrize("softmax_type", ["off-by-one", "learnable"])
@pytest.mark.parametrize("window", [None, (2, 0)])
def test_softmax_with_an_offset_adds_to_the_denominator(softmax_type, window):
    layers = inputs()
    module = attention(softmax_type=softmax_type, window_size=window)
    leaves = list(layers)
    offset = torch.zeros(HEADS, device=helpers.DEVICE)
    if softmax_type == "learnable":
        assert module.softmax_offset.shape == (HEADS,)
        with torch.no_grad():
            module.softmax_offset.copy_(helpers.random(HEADS, seed=5))
        offset = module.softmax_offset
        leaves.append(offset)
    mine = module(*layers, attn_mask_type=CAUSAL)
    hidden = band(6, 6, window[0] if window else None, 0)
    check(mine, expected(*layers, hidden, offset), leaves)


def test_values_may_have_another_size_than_keys():
    query, key, _ = inputs()
    value = helpers.random(6, 2, GROUPS, 8, seed=7)
    module = te.DotProductAttention(HEADS, (SIZE, 8), num_gqa_groups=GROUPS)
    mine = module(query, key, value, attn_mask_type=CAUSAL)
    torch.testing.assert_close(
        mine, expected(query, key, value, band(6, 6, None, 0)), rtol=1e-4, atol=1e-5
    )


def test_pruned_heads_are_followed():
    query, key, value = inputs()
    module = attention()
    whole = module(query, key, value, attn_mask_type=CAUSAL).unflatten(-1, (HEADS, SIZE))
    module.num_attention_heads, module.num_gqa_groups = 2, 1
    pruned = module(query[:, :, 2:], key[:, :, 1:], value[:, :, 1:], attn_mask_type=CAUSAL)
    torch.testing.assert_close(pruned.unflatten(-1, (2, SIZE)), whole[:, :, 2:])


def test_gradients_survive_the_next_write_to_a_cache_of_keys():
    cache = torch.zeros(2, 12, 2, GROUPS, SIZE, device=helpers.DEVICE)
    query, key, value = inputs()
    total = torch.zeros((), device=helpers.DEVICE)
    for start in (0, 6):
        cache[0, start : start + 6] = key
        cache[1, start : start + 6] = value
        keys, values = cache[0, : start + 6], cache[1, : start + 6]
        total = total + attention()(query, keys, values, attn_mask_type="no_mask").square().sum()
    # The same keys and values twice change nothing.
    reference = 2 * expected(query, key, value, None).square().sum()
    check(total, reference, [query, key, value])


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(each, torch.Tensor):
                self.numel = max(self.numel, each.numel())
        return out


def test_causal_attention_allocates_nothing_of_the_size_of_a_mask():
    length = 2048
    query = helpers.random(length, 1, HEADS, SIZE, dtype=torch.bfloat16)
    key = helpers.random(length, 1, GROUPS, SIZE, dtype=torch.bfloat16)
    with _Largest() as largest, torch.no_grad():
        attention()(query, key, key, attn_mask_type=CAUSAL)
    assert largest.numel <= length * HEADS * SIZE


def test_dropout_acts_in_training_only():
    layers = inputs()
    module = attention(attention_dropout=0.5)
    torch.testing.assert_close(
        module.eval()(*layers, attn_mask_type=CAUSAL), attention()(*layers, attn_mask_type=CAUSAL)
    )
    first = module.train()(*layers, attn_mask_type=CAUSAL)
    assert not torch.equal(first, module(*layers, attn_mask_type=CAUSAL))


def test_context_parallelism_and_packed_sequences_are_refused():
    with pytest.raises(NotImplementedError, match="context parallelism"):
        attention(cp_group=object())
    with pytest.raises(NotImplementedError, match="has no qkv_format, cu_seqlens_q"):
        attention()(*inputs(), qkv_format="thd", cu_seqlens_q=torch.tensor([0, 6]))
