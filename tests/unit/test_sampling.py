"""Choosing tokens: the distribution that is asked for, the same draws wherever a row stands."""

from __future__ import annotations

import math

import torch

from post_training.inference.sampling import Sampler, filtered, greedy, uniform

LOGITS = torch.tensor([[2.0, 0.5, 1.5, -1.0, 0.0], [0.0, 3.0, 0.1, 0.2, 2.5]])


def test_greedy_takes_the_most_probable_token():
    assert greedy(LOGITS).tolist() == [0, 1]


def test_draws_have_the_frequencies_of_the_softmax_at_the_temperature():
    count, temperature = 4000, 0.7
    sampler = Sampler(temperature, seed=3, names=["row"])
    drawn = sampler(LOGITS[:1].expand(count, -1), [0] * count, range(count))
    expected = (LOGITS[0] / temperature).softmax(0)
    found = torch.bincount(drawn, minlength=5) / count
    # Four standard deviations of a binomial share.
    assert ((found - expected).abs() < 4 * (expected * (1 - expected) / count).sqrt()).all()


def test_top_k_leaves_the_most_probable_tokens():
    probabilities, order = filtered(LOGITS, top_k=2)
    assert order.tolist() == [[0, 2], [1, 4]]
    first = math.exp(2.0) / (math.exp(2.0) + math.exp(1.5))
    torch.testing.assert_close(probabilities[0], torch.tensor([first, 1 - first]))


def test_top_p_leaves_the_fewest_tokens_that_reach_the_mass():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for mass, kept in ((0.1, 1), (0.5, 1), (0.55, 2), (0.8, 2), (0.81, 3), (1.0, 4)):
        probabilities, _ = filtered(logits, top_p=mass - 1e-6)
        assert int((probabilities > 0).sum()) == kept, mass


def test_top_p_counts_what_top_k_leaves():
    """0.5 and 0.3 of 0.8 are 0.625 and 0.375: the first alone reaches 0.6."""
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    probabilities, _ = filtered(logits, top_k=2, top_p=0.6)
    assert (probabilities > 0).tolist() == [[True, False]]


def test_removed_tokens_are_never_drawn():
    sampler = Sampler(5.0, top_k=3, top_p=0.7, names=["row"])
    drawn = sampler(LOGITS[:1].expand(500, -1), [0] * 500, range(500))
    assert set(drawn.tolist()) == {0, 2}


def test_a_draw_depends_on_the_row_and_not_on_its_place_in_the_batch():
    sampler = Sampler(1.0, seed=5, names=["a", "b"])
    together = sampler(LOGITS, [0, 1], [7, 9]).tolist()
    swapped = sampler(LOGITS.flip(0), [1, 0], [9, 7]).tolist()
    alone = sampler(LOGITS[1:], [1], [9]).tolist()
    assert together == swapped[::-1]
    assert alone == together[1:]


def test_draws_differ_by_seed_name_and_position():
    draws = {uniform(s, n, p) for s in range(3) for n in ("a", "b") for p in range(50)}
    assert len(draws) == 300
    assert all(0 <= draw < 1 for draw in draws)
    assert abs(sum(draws) / 300 - 0.5) < 0.07
