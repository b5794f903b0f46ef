"""Inference on megatron-core models: chosen positions, cached decoding, shared prefixes, TP and PP.

Random float32 models; one worker process group for each layout (generation_worker.py).
"""

from pathlib import Path
from typing import Any

import pytest
import tools
import torch
from generation_worker import LENGTHS, MODELS, PROMPTS

from post_training.inference.generation import _groups

LAYOUTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2)}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("inference")
    return {name: run(folder / name, *sizes) for name, sizes in LAYOUTS.items()}


def run(output: Path, tensor: int, pipeline: int) -> dict[str, Any]:
    sizes = ("--tensor-model-parallel-size", tensor, "--pipeline-model-parallel-size", pipeline)
    worker = "tests/helpers/generation_worker.py"
    tools.run(worker, output, "--fp32", *sizes, processes=tensor * pipeline)
    return torch.load(output, weights_only=True)


@pytest.mark.parametrize("model", MODELS)
def test_last_logits_are_those_of_the_whole_sequence_despite_padding(results, model):
    found = results["TP1"][model]
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found["last"][row], found["all"][row, length - 1])


@pytest.mark.parametrize("model", MODELS)
def test_chosen_tokens_are_columns_of_the_logits(results, model):
    found = results["TP1"][model]
    assert torch.equal(found["some"], found["last"][:, [7, 0, 95]])


def test_the_output_layer_computes_one_position_of_each_sequence(results):
    assert results["TP1"]["output_positions"] == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_decoding_with_a_cache_gives_the_tokens_of_decoding_without(results, model, layout):
    found = results[layout][model]
    assert found["tokens"] == found["tokens_without_cache"]
    assert all(len(tokens) == 12 for tokens in found["tokens"])


@pytest.mark.parametrize("model", MODELS)
def test_prompts_of_different_lengths_in_a_batch_go_on_as_if_alone(results, model):
    found = results["TP1"][model]
    assert found["tokens"] == found["tokens_alone"]


@pytest.mark.parametrize("model", MODELS)
def test_generation_is_the_greedy_choice_of_the_logits(results, model):
    """Differing texts, or the test would pass on a model that repeats one token."""
    tokens = results["TP1"][model]["tokens"]
    assert len({token for line in tokens for token in line}) > 10
    assert len(tokens) == len(PROMPTS)


@pytest.mark.parametrize("model", MODELS)
def test_a_sequence_ends_with_its_end_token(results, model):
    found = results["TP1"][model]
    ends = {found["tokens"][0][3], found["tokens"][2][5]}
    for whole, ended in zip(found["tokens"], found["tokens_until_end"], strict=True):
        stop = next((i + 1 for i, token in enumerate(whole) if token in ends), len(whole))
        assert ended == whole[:stop]


def test_padding_of_the_vocabulary_is_never_chosen(results):
    found = results["TP1"]["tied"]["tokens_of_small_vocabulary"]
    assert max(token for line in found for token in line) < 9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_a_shared_prefix_gives_the_logits_of_the_whole_prompts(results, model, layout):
    found = results[layout][model]
    assert found["supports_prefix"]
    torch.testing.assert_close(found["after_prefix"], found["whole_prompts"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("layout", ["TP2", "PP2"])
@pytest.mark.parametrize("model", MODELS)
def test_every_layout_gives_the_same(results, model, layout):
    """Tensor parallelism adds the halves of a sum in another order; pipelining changes nothing."""
    one, other = results["TP1"][model], results[layout][model]
    tolerance = 1e-4 if layout == "TP2" else 0.0
    for key in ("all", "last", "some", "after_prefix"):
        torch.testing.assert_close(other[key], one[key], rtol=0, atol=tolerance)
    assert other["tokens"] == one["tokens"]


def test_a_training_step_works_after_inference(results):
    assert results["TP1"]["gradients"]


def test_calibration_data_and_its_errors_come_from_the_first_rank(results):
    assert results["TP2"]["first_rank"]


def test_groups_hold_prompts_of_near_lengths():
    assert _groups([9, 1, 30, 2, 10], batch_size=2, spread=5) == [[1, 3], [0, 4], [2]]
    assert _groups([5, 5, 5], batch_size=2, spread=0) == [[0, 1], [2]]
    assert _groups([], batch_size=2, spread=0) == []
