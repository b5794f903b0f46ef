"""Tensor, sequence, pipeline and expert parallelism over two processes, with the stand-ins."""

from __future__ import annotations

from pathlib import Path

import portable_helpers as helpers
import pytest

LAYOUTS = ("sequence whole", "sequence parallel")
LINEAR = (
    "output",
    "input gradient",
    "column weight gradient",
    "column bias gradient",
    "row weight gradient",
    "row bias gradient",
)


@pytest.fixture(scope="module")
def differences(tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Relative differences by name, from one run of two ranks."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    helpers.save_tiny_qwen3(folder / "qwen3")
    helpers.save_tiny_qwen3(folder / "qwen3-moe", experts=4)
    return helpers.run_ranks(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["linear", "norm linear"])
def test_split_linears_equal_whole_ones_forward_and_backward(differences, kind, layout):
    for name in (*LINEAR, *(["norm gradient"] if kind == "norm linear" else [])):
        assert differences[f"{kind}, {layout}: {name}"] < 1e-6, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("spec", helpers.SPECS)
def test_a_gpt_model_at_tp2_equals_transformers_and_its_gradients_equal_tp1(
    differences, spec, layout
):
    assert differences[f"{spec}, TP=2, {layout}: logits"] < 1e-5
    assert differences[f"{spec}, TP=2, {layout}: gradients"] < 1e-4


@pytest.mark.parametrize("spec", helpers.SPECS)
def test_a_gpt_model_at_pp2_equals_transformers(differences, spec):
    assert differences[f"{spec}, PP=2: logits"] < 1e-5


@pytest.mark.parametrize("sizes", ["EP=2", "TP=2, EP=2"])
def test_a_mixture_of_experts_over_two_ranks_equals_transformers(differences, sizes):
    assert differences[f"mixture, {sizes}: logits"] < 1e-5
