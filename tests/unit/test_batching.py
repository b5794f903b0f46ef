"""How many sequences are computed at a time changes no result, and memory that runs out costs no
result that was there."""

import json

import pytest
import tools
import torch

from post_training.common.errors import UsageError
from post_training.config import batch_size
from post_training.data.calibration_data import CalibrationData
from post_training.inference.batching import Batching
from post_training.quantization.calibration import Calibration

SEQUENCES, LENGTH = 12, 64


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """A mixture of experts in float32, calibrated with passes of several sizes."""
    folder = tmp_path_factory.mktemp("batching")
    tools.random_model(folder / "model", "qwen3-moe", num_hidden_layers=2)
    long = {"original_max_position_embeddings": 170, "num_hidden_layers": 2}
    tools.random_model(folder / "long", "longrope", **long)
    lines = [json.dumps({"text": f"Fact {i}: {i} plus {i} is {2 * i}."}) for i in range(200)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    tools.run(
        "tests/helpers/batching_worker.py",
        folder / "results.pt",
        *("--pretrained-model-path", folder / "model", "--fp32"),
        *("--calib-dataset-path-or-name", folder / "text.jsonl"),
        *("--calib-size", SEQUENCES, "--calib-max-sequence-length", LENGTH),
    )
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("size", ["3", "auto", "scarce"])
def test_scales_are_those_of_single_sequences_bit_for_bit(found, size):
    single, other = found["calibration"]["1"], found["calibration"][size]
    assert len(single["scales"]) > 20
    assert single["scales"].keys() == other["scales"].keys()
    for name, amax in single["scales"].items():
        assert torch.equal(amax, other["scales"][name]), name


def test_auto_takes_more_than_one_sequence_and_sees_all(found):
    for name in ("1", "auto", "scarce"):  # once, and one sequence to see which quantizers are used
        assert found["calibration"][name]["tokens"] == (SEQUENCES + 1) * LENGTH, name
    assert found["calibration"]["1"]["largest"] == 1
    assert found["calibration"]["auto"]["largest"] == SEQUENCES
    assert found["calibration"]["auto"]["halved"] == 0


def test_a_pass_without_memory_is_halved_until_it_fits_and_counts_once(found):
    scarce = found["calibration"]["scarce"]
    assert scarce["refused"] == [12, 6]
    assert (scarce["halved"], scarce["largest"]) == (2, 3)
    assert scarce["experts"] == found["calibration"]["1"]["experts"]


def test_the_allocators_own_refusal_is_understood(found):
    limit = found["limit"]
    assert limit["rows"] == list(range(40))
    assert limit["sums"] == [1 << 21] * len(limit["sums"])
    assert limit["halved"] >= 1
    assert 1 <= limit["largest"] < 12


def test_a_given_number_is_kept_and_a_single_sequence_that_does_not_fit_is_an_error(found):
    assert "--calib-batch-size 4" in found["refused"]["given"]
    assert "give --calib-batch-size 2" in found["refused"]["given"]
    assert "does not take a single sequence" in found["refused"]["single"]


def test_losses_and_tokens_are_those_of_single_sequences(found):
    single = found["loss"]["1"]
    assert found["loss"]["3"] == pytest.approx(single, rel=1e-6)
    assert found["loss"]["auto"] == pytest.approx(single, rel=1e-6)
    assert found["tokens"]["auto"] == found["tokens"]["3"] == found["tokens"]["1"]


def test_texts_that_are_rotated_by_their_length_are_computed_as_if_alone(found):
    results = found["by length"]
    assert torch.allclose(results["losses, 1"], results["losses, 8"], rtol=1e-5)
    assert len(results["logits, 1"]) == 45
    assert torch.allclose(results["logits, 1"], results["logits, 8"], atol=1e-4)


def test_what_is_neither_a_number_nor_auto_is_refused():
    assert batch_size.number_or_auto("auto") == "auto"
    assert batch_size.number_or_auto("3") == 3
    for value in (0, -1):
        with pytest.raises(UsageError, match="or auto"):
            batch_size.check("--calib-batch-size", value)


@pytest.mark.parametrize(
    ("asked", "length", "most"),
    [("auto", 512, 8), ("auto", 3000, 1), ("auto", 100_000, 1), (3, 512, 3)],
)
def test_passes_that_add_up_have_a_size_that_no_machine_changes(asked, length, most):
    data = CalibrationData(torch.zeros(2, length, dtype=torch.int64), 1, 2 * length, "text", 2)
    assert Calibration(data, Batching(asked, "--calib-batch-size")).at_once == most
